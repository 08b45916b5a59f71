"""The outputs of all rows. The backward pass computes each micro-batch again.

Inside a trace this is one scan over equal micro-batches and one more call for the rest. Outside a
trace, micro-batches run one after another.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from virtualbatch.jax._arrays import is_array, map_arrays
from virtualbatch.jax._aux import in_order
from virtualbatch.jax._convolution import is_slow_backwards
from virtualbatch.jax._rowwise.entries import check_alike
from virtualbatch.jax._rowwise.rule import looped
from virtualbatch.jax._rowwise.traces import Traced, Traces
from virtualbatch.jax._segment import Cut, Segment, specs


def run_compiled(traces: Traces, cut: Cut) -> Any:
    """The outputs for all rows, inside a trace.

    Args:
        traces: computes the outputs of a micro-batch.
        cut: the micro-batches.
    """
    stacked, outputs, offset = [], [], 0
    for segment in cut.segments:
        traced = traces.of(specs(segment, segment.rows))
        outputs.append(traced.outputs)
        stacked.append(_stacked(traced, segment, offset))
        offset += segment.count
    check_alike(outputs)
    return _joined(cut, outputs[0], stacked)


def _stacked(traced: Traced, segment: Segment, offset: int) -> list[Any]:
    """Outputs of the micro-batches of a segment, of shape (micro-batches, rows, ...)."""

    def run(k: Any, *shared: Any) -> list[Any]:
        return traced.run(offset + k, shared, segment.get(k))

    shared, count = traced.shared, segment.count
    if count == 1:
        return [x[None] for x in jax.checkpoint(run)(jnp.int32(0), *shared)]
    if is_slow_backwards(traced.program):
        number = jax.ShapeDtypeStruct((), jnp.int32)
        return looped(jax.make_jaxpr(run)(number, *shared), count, shared)
    # prevent_cse=False: in a scan, XLA cannot merge the forward passes of the two loops.
    again = jax.checkpoint(run, prevent_cse=False)
    numbers = jnp.arange(count, dtype=jnp.int32)
    found: list[Any] = lax.scan(lambda _, k: (None, again(k, *shared)), None, numbers)[1]
    return found


def run_eager(traces: Traces, cut: Cut) -> Any:
    """The outputs for all rows, outside a trace.

    Args:
        traces: computes the outputs of a micro-batch.
        cut: the micro-batches.
    """
    outputs, found = [], []
    for index, microbatch in enumerate(cut.microbatches()):
        traced = traces.of(map_arrays(jax.typeof, microbatch))
        outputs.append(traced.outputs)
        arrays = [leaf for leaf in jax.tree.leaves(microbatch) if is_array(leaf)]
        found.append(jax.checkpoint(traced.run)(np.int32(index), traced.shared, arrays))
    check_alike(outputs)
    by_leaf = [_by_segment(cut, column) for column in zip(*found, strict=True)]
    return _joined(cut, outputs[0], [*zip(*by_leaf, strict=True)])


def _by_segment(cut: Cut, column: Sequence[Any]) -> list[Any]:
    pieces = iter(column)
    return [jnp.stack([next(pieces) for _ in range(part.count)]) for part in cut.segments]


def _joined(cut: Cut, like: Any, stacked: Sequence[Sequence[Any]]) -> Any:
    """Joins the outputs of all segments, in the caller's order of rows."""
    leaves = [in_order(pieces, cut) for pieces in zip(*stacked, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def judge(traces: Traces, cut: Cut) -> None:
    """Refuses outputs that have one entry per row only by chance.

    Micro-batches of two sizes show that by themselves. Otherwise the function is traced with twice
    the rows. Twice the rows keep groups of rows whole.

    Args:
        traces: computes the outputs of a micro-batch.
        cut: the micro-batches.

    Raises:
        ValueError: an output has another number of entries.
        TypeError: an output is no array, or the function does not run with other rows.
    """
    if len(set(cut.rows)) > 1:
        return
    first = cut.segments[0]
    rows = 2 * first.rows
    traces.of(specs(first, rows))
