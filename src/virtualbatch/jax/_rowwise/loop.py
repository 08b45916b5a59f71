"""The entries of all rows: micro-batches in one loop, each computed again in the backward pass.

Inside a trace this is one scan over equal micro-batches and one more call for the rest, outside of
one micro-batch after another.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from virtualbatch.jax._arrays import is_array, of_arrays
from virtualbatch.jax._aux import in_order
from virtualbatch.jax._batch import Cut, Segment, specs
from virtualbatch.jax._convolution import is_slow_backwards
from virtualbatch.jax._rowwise.entries import RowFunction, check_alike
from virtualbatch.jax._rowwise.rule import looped


def run_compiled(function: RowFunction, cut: Cut) -> Any:
    """The outputs for all rows, inside a trace.

    Args:
        function: what computes those of a micro-batch.
        cut: the micro-batches.
    """
    # Micro-batches of one shape may come in several runs.
    again = len(cut.segments) > len({segment.rows for segment in cut.segments})
    entries = of_arrays(function.entries, jax.jit) if again else function.entries
    leaves, structure = jax.tree.flatten(function.shared())
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    stacked, outputs, offset = [], [], 0
    for segment in cut.segments:

        def one(
            k: Any, arrays: Sequence[Any], segment: Segment = segment, offset: int = offset
        ) -> Any:
            given = iter(arrays)
            filled = [next(given) if is_array(leaf) else leaf for leaf in leaves]
            shared = jax.tree.unflatten(structure, filled)
            return entries(shared, segment.get(k), offset + k)

        number = jax.ShapeDtypeStruct((), jnp.int32)
        program, found = jax.make_jaxpr(one, return_shape=True)(number, arrays)
        outputs.append(found)
        stacked.append(_stacked(program, segment.count, arrays))
        offset += segment.count
    check_alike(outputs)
    return _joined(cut, outputs[0], stacked)


def _stacked(program: ClosedJaxpr, count: int, arrays: Sequence[Any]) -> list[Any]:
    """Outputs of the micro-batches of a segment, of shape (micro-batches, rows, ...)."""
    run = jaxpr_as_fun(program)
    if count == 1:
        return [x[None] for x in jax.checkpoint(run)(jnp.int32(0), *arrays)]
    if is_slow_backwards(program):
        return looped(program, count, arrays)
    # In a loop nothing is computed once for both passes, so nothing has to be kept apart.
    again = jax.checkpoint(run, prevent_cse=False)
    numbers = jnp.arange(count, dtype=jnp.int32)
    found: list[Any] = lax.scan(lambda _, k: (None, again(k, *arrays)), None, numbers)[1]
    return found


def run_eager(function: RowFunction, cut: Cut) -> Any:
    """The outputs for all rows, outside a trace.

    Args:
        function: what computes those of a micro-batch.
        cut: the micro-batches.
    """
    entries = of_arrays(function.entries, jax.checkpoint)
    shared = function.shared()
    found = [
        entries(shared, microbatch, np.int32(index))
        for index, microbatch in enumerate(cut.microbatches())
    ]
    check_alike(found)
    columns = zip(*map(jax.tree.leaves, found), strict=True)
    by_leaf = [_by_segment(cut, column) for column in columns]
    return _joined(cut, found[0], [*zip(*by_leaf, strict=True)])


def _by_segment(cut: Cut, column: Sequence[Any]) -> list[Any]:
    pieces = iter(column)
    return [jnp.stack([next(pieces) for _ in range(part.count)]) for part in cut.segments]


def _joined(cut: Cut, like: Any, stacked: Sequence[Sequence[Any]]) -> Any:
    """Outputs in the caller's order of rows, from those of each segment."""
    leaves = [in_order(pieces, cut) for pieces in zip(*stacked, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def judge(function: RowFunction, cut: Cut) -> None:
    """Refuses outputs that have one entry per row by coincidence only.

    Micro-batches of two sizes tell by themselves. Else the function is traced for twice the rows,
    which keeps groups of rows whole.

    Args:
        function: what computes the outputs of a micro-batch.
        cut: the micro-batches.

    Raises:
        ValueError: an output has another number of entries.
        TypeError: an output is no array, or the function does not run with other rows.
    """
    if len(set(cut.rows)) > 1:
        return
    first = cut.segments[0]
    rows = 2 * first.rows
    microbatch = specs(first, rows)
    arrays = [leaf for leaf in jax.tree.leaves(microbatch) if is_array(leaf)]

    def entries(arrays: Sequence[Any]) -> Any:
        given = iter(arrays)
        filled = jax.tree.map(lambda x: next(given) if is_array(x) else x, microbatch)
        return function.entries(function.shared(), filled, np.int32(0))

    jax.make_jaxpr(entries)(arrays)
