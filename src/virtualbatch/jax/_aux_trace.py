"""The aux of a loss function, traced without data: its shapes, and the sources of its leaves."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from virtualbatch.jax._arrays import is_array, map_arrays
from virtualbatch.jax._dependence import BATCH, STATE, Source, given, sources
from virtualbatch.jax._objective import Call
from virtualbatch.jax._segment import Cut, specs
from virtualbatch.window.aux import AuxLeaf, AuxShapes

_kept = AuxShapes()


class AuxTrace:
    """The aux of one call, traced with other numbers of rows if needed.

    An un-jitted loop needs the same traces at every update, so they are kept while the loss lives.

    Args:
        call: the call.
        cut: the window.
        auxes: the leaves of aux of each micro-batch, or of one micro-batch of each shape.
    """

    def __init__(self, call: Call, cut: Cut, auxes: Sequence[Sequence[AuxLeaf]]):
        self._call = call
        self._cut = cut
        self._aux = tuple(auxes[0])
        self._traced: dict[int, _Traced] = {}

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        """What the traces depend on, in addition to the loss and the rows."""
        arguments, structure = jax.tree.flatten((self._call.args, dict(self._call.kwargs)))
        return (structure, *map(_kind_of, arguments), *self._aux)

    def leaves(self, rows: int) -> list[AuxLeaf]:
        """The leaves of aux for a micro-batch with that many rows."""

        def find() -> list[AuxLeaf]:
            return leaves_of(self._at(rows).aux)

        found: list[AuxLeaf] = _kept.of(self._call.fun, ("leaves", rows, self._key), find)
        return found

    def origins(self, rows: int, other: int) -> list["Origin"]:
        """What each leaf is computed from.

        Args:
            rows: a number of rows.
            other: another number of rows.
        """

        def find() -> list[Origin]:
            pairs = zip(self._at(rows).sources, self._at(other).sources, strict=True)
            return [
                Origin(
                    BATCH in a.reads | b.reads,
                    STATE in a.counts | b.counts,
                    a.formula != b.formula,
                )
                for a, b in pairs
            ]

        key = ("origins", rows, other, self._key)
        found: list[Origin] = _kept.of(self._call.fun, key, find)
        return found

    def _at(self, rows: int) -> "_Traced":
        if rows not in self._traced:
            self._traced[rows] = _traced(self._call, self._cut, rows)
        return self._traced[rows]


class Origin(NamedTuple):
    """What a leaf of aux is computed from.

    Fields:
        batch: whether it depends on entries of the batch.
        counts_on: whether an integer of another argument reaches it through integers alone.
        follows_rows: whether its formula changes with the number of rows.
    """

    batch: bool
    counts_on: bool
    follows_rows: bool


class _Traced(NamedTuple):
    aux: Any
    sources: list[Source]


def leaves_of(found: Any) -> list[AuxLeaf]:
    """The length, dtype and shape of each leaf of aux, which decide how it is merged."""
    return [
        AuxLeaf(_axes(x)[:1], str(jnp.result_type(x)), _axes(x)[1:])
        if hasattr(x, "dtype") or isinstance(x, int | float | complex)
        else AuxLeaf((), type(x).__name__)
        for x in jax.tree.leaves(found)
    ]


def _traced(call: Call, cut: Cut, rows: int) -> _Traced:
    microbatch = specs(cut.segments[0], rows)
    others, structure = jax.tree.flatten((call.arguments(None), dict(call.kwargs)))
    batch = [x for x in jax.tree.leaves(microbatch) if is_array(x)]

    def program(is_input: Callable[[Any], bool]) -> _Traced:
        inputs = [x for x in others if is_input(x)]

        def aux(arrays: Sequence[Any], inputs: Sequence[Any]) -> Any:
            rest, array = iter(inputs), iter(arrays)
            filled = [next(rest) if is_input(x) else x for x in others]
            args, kwargs = jax.tree.unflatten(structure, filled)
            made = call._replace(args=args, kwargs=kwargs)
            return made.terms(made.arguments(map_arrays(lambda _: next(array), microbatch)))[1]

        found, shapes = jax.make_jaxpr(aux, return_shape=True)(batch, inputs)
        labels = [BATCH] * len(batch) + [STATE] * len(inputs)
        variables = enumerate(zip(labels, found.jaxpr.invars, strict=True))
        return _Traced(shapes, sources(found, [given(label, k, v) for k, (label, v) in variables]))

    try:
        try:
            # A Python int may be a count, so it is traced too.
            return program(lambda x: is_array(x) or type(x) is int)
        except _UNTRACEABLE:
            # The int may be a constant of the program, such as a number of layers.
            return program(is_array)
    except _UNTRACEABLE as error:
        raise TypeError(
            "With has_aux=True a loss function must be traceable with any number of rows: this "
            f"shows how the leaves of aux are merged. Got {type(error).__name__} with {rows} "
            f"rows: {error}. Use JAX operations instead of branches on values and of a fixed "
            'number of rows; or name the merge: aux_merge="rows", "sum", "mean", "max" or "keep", '
            "or a prefix of aux with these. See docs/guides/state.md."
        ) from error


_UNTRACEABLE = (TypeError, ValueError, IndexError)


def _kind_of(leaf: Any) -> Any:
    """The properties of an argument that a program depends on."""
    if is_array(leaf):
        return (leaf.shape, leaf.dtype)
    return type(leaf) if type(leaf) in (int, float, complex) else leaf


def _axes(x: Any) -> tuple[int, ...]:
    return tuple(getattr(x, "shape", ()))
