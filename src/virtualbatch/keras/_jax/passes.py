"""Runs the micro-batches of a window one after another: in a scan, or eagerly in a Python loop."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun

from virtualbatch.jax._convolution import with_fast_convolutions
from virtualbatch.jax._segment import Cut, Segment
from virtualbatch.keras._jax.packing import branches, chosen


class Step(NamedTuple):
    """The results of one micro-batch.

    Fields:
        sums: values that are merged with the sums of the other micro-batches.
        state: the state with which the next micro-batch begins.
        latest: values that are kept of the last micro-batch only.
        kept: values that are kept of every micro-batch.
    """

    sums: Any
    state: Any
    latest: Any
    kept: Any


class Window(NamedTuple):
    """The results of all micro-batches; see `Step`.

    `kept` has one entry per segment, with the values of its micro-batches stacked.
    """

    sums: Any
    state: Any
    latest: Any
    kept: list[Any]


# (micro-batch, its rows, state, argument shared by all, argument of this one) -> its results.
StepFn = Callable[[Any, int, Any, Any, Any], Step]
Merge = Callable[[Any, Any], Any]


def eager_pass(
    cut: Cut, step: StepFn, state: Any, given: Any, own: Sequence[Any] | None, merge: Merge
) -> Window:
    """Runs the micro-batches in a Python loop.

    Args:
        cut: the batch, cut.
        step: runs one micro-batch.
        state: the state with which the first micro-batch begins.
        given: an argument that is the same for all micro-batches.
        own: for each segment, the arguments of its single micro-batches, stacked; or None.
        merge: (sums, sums) -> merged sums.
    """
    sums, latest, kept = None, None, []
    for segment, theirs in zip(cut.segments, own or _nothing(cut), strict=True):
        pieces = []
        for k in range(segment.count):
            mine = jax.tree.map(lambda leaf, k=k: leaf[k], theirs)
            found = step(segment.get(k), segment.rows, state, given, mine)
            sums = found.sums if sums is None else merge(sums, found.sums)
            state, latest = found.state, found.latest
            pieces.append(found.kept)
        kept.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *pieces))
    return Window(sums, state, latest, kept)


class TracedPass:
    """A step, traced for the micro-batches of each segment but not run yet.

    Args:
        cut: the batch, cut.
        step: runs one micro-batch. It is traced once for each shape of a micro-batch.
        state: the state with which the first micro-batch begins.
        given: an argument that is the same for all micro-batches; arrays or their shapes.
        own: for each segment, the arguments of its single micro-batches, stacked; or None.
    """

    def __init__(self, cut: Cut, step: StepFn, state: Any, given: Any, own: Sequence[Any] | None):
        self._state = state
        self._own = own or _nothing(cut)
        self._programs: list[tuple[Segment, list[Any], Step]] = []
        index = jax.ShapeDtypeStruct((), jnp.int32)
        for segment, theirs in zip(cut.segments, self._own, strict=True):
            mine = jax.eval_shape(lambda x: jax.tree.map(lambda leaf: leaf[0], x), theirs)
            traced = []
            for get in branches(segment):

                def run(
                    k: Any,
                    state: Any,
                    given: Any,
                    mine: Any,
                    get: Any = get,
                    rows: int = segment.rows,
                ) -> Step:
                    return step(get(k), rows, state, given, mine)

                program, outputs = jax.make_jaxpr(run, return_shape=True)(index, state, given, mine)
                traced.append(jaxpr_as_fun(with_fast_convolutions(program)))
            self._programs.append((segment, traced, outputs))

    @property
    def sums(self) -> Any:
        """Shapes of the sums."""
        return self._programs[0][2].sums

    def run(self, nothing: Any, given: Any, merge: Merge) -> Window:
        """Runs all micro-batches: equal ones in a scan, the rest in one more call.

        Args:
            nothing: the neutral sums: merging them with other sums changes nothing.
            given: an argument that is the same for all micro-batches; arrays.
            merge: (sums, sums) -> merged sums.
        """
        carry = (nothing, self._state, jax.tree.map(jnp.zeros_like, self._programs[0][2].latest))
        kept = []
        for (segment, traced, outputs), theirs in zip(self._programs, self._own, strict=True):

            def body(
                carry: Any, x: Any, entry: Any = (segment, traced), outputs: Any = outputs
            ) -> Any:
                (sums, state, _), (k, mine) = carry, x
                found = chosen(*entry, k, *jax.tree.leaves((k, state, given, mine)))
                found = jax.tree.unflatten(jax.tree.structure(outputs), found)
                after = (merge(sums, found.sums), found.state, found.latest)
                return _like(after, carry), found.kept

            index = jnp.arange(segment.count, dtype=jnp.int32)
            if segment.count == 1:
                first = jax.tree.map(lambda leaf: leaf[0], (index, theirs))
                carry, found = body(carry, first)
                found = jax.tree.map(lambda leaf: leaf[None], found)
            else:
                carry, found = lax.scan(body, carry, (index, theirs))
            kept.append(found)
        return Window(*carry, kept)


def run_pass(
    cut: Cut,
    step: StepFn,
    state: Any,
    given: Any,
    own: Sequence[Any] | None,
    merge: Merge,
    nothing: Callable[[Any], Any],
    compiled: bool,
) -> Window:
    """Runs the micro-batches: in a Python loop, or traced if the call is inside a trace.

    Args:
        cut: see `TracedPass`.
        step: see `TracedPass`.
        state: see `TracedPass`.
        given: see `TracedPass`; arrays.
        own: see `TracedPass`.
        merge: (sums, sums) -> merged sums.
        nothing: shapes of sums -> neutral sums; see `TracedPass.run`.
        compiled: whether this runs inside a trace.
    """
    if not compiled:
        return eager_pass(cut, step, state, given, own, merge)
    traced = TracedPass(cut, step, state, given, own)
    return traced.run(nothing(traced.sums), given, merge)


def _nothing(cut: Cut) -> list[None]:
    return [None] * len(cut.segments)


def _like(found: Any, carry: Any) -> Any:
    """The results of a micro-batch in the structure and dtypes of the carry, as a scan needs."""
    leaves = [
        jnp.asarray(x).astype(y.dtype)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(carry), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(carry), leaves)
