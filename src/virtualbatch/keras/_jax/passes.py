"""The micro-batches of a window one after another: a scan, or eagerly a loop in Python."""

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
    """What one micro-batch leaves.

    Fields:
        sums: what is merged with the sums of the others.
        state: what the next micro-batch begins with.
        latest: what of the last micro-batch remains.
        kept: what of every micro-batch remains.
    """

    sums: Any
    state: Any
    latest: Any
    kept: Any


class Window(NamedTuple):
    """What all micro-batches leave: as `Step`, kept a list with one entry per segment.

    An entry has what its micro-batches kept, stacked.
    """

    sums: Any
    state: Any
    latest: Any
    kept: list[Any]


# (micro-batch, its rows, state, what is the same for all, what is its own) -> what it leaves.
StepFn = Callable[[Any, int, Any, Any, Any], Step]
Merge = Callable[[Any, Any], Any]


def eager_pass(
    cut: Cut, step: StepFn, state: Any, given: Any, own: Sequence[Any] | None, merge: Merge
) -> Window:
    """Goes through the micro-batches in Python.

    Args:
        cut: the batch, cut.
        step: runs one micro-batch.
        state: what the first one begins with.
        given: what is the same for all.
        own: for each segment what its micro-batches are given besides, stacked; None if nothing.
        merge: of sums.
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
    """A step traced for the micro-batches of each segment, not run yet.

    Args:
        cut: the batch, cut.
        step: what is traced: once for each shape that a micro-batch may have.
        state: what the first one begins with.
        given: what is the same for all; arrays or their shapes.
        own: for each segment what its micro-batches are given besides, stacked; None if nothing.
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
        """Runs it: equal micro-batches in a scan, the rest in one more call.

        Args:
            nothing: what any sums can be merged with without a change.
            given: what is the same for all; arrays.
            merge: of sums.
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
    """Goes through the micro-batches, one way or the other.

    Args:
        cut: see `TracedPass`.
        step: see there.
        state: see there.
        given: see there; arrays.
        own: see there.
        merge: of sums.
        nothing: shapes of sums -> what any sums can be merged with without a change.
        compiled: whether this runs inside a trace.
    """
    if not compiled:
        return eager_pass(cut, step, state, given, own, merge)
    traced = TracedPass(cut, step, state, given, own)
    return traced.run(nothing(traced.sums), given, merge)


def _nothing(cut: Cut) -> list[None]:
    return [None] * len(cut.segments)


def _like(found: Any, carry: Any) -> Any:
    """What a micro-batch leaves, in the structure and dtypes that it took."""
    leaves = [
        jnp.asarray(x).astype(y.dtype)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(carry), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(carry), leaves)
