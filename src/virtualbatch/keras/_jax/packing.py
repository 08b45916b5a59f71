"""A batch of `fit` on JAX, packed: sorted, cut and trimmed inside the program.

A program has fixed shapes. So all micro-batches have the same number of rows: as many as fit at the
full padded length. Each is trimmed to one of a few lengths. The program has one branch for each
length, and the lengths of a batch choose the branch. So new data never needs a new program.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import lax

from virtualbatch.jax._segment import Cut, Segment
from virtualbatch.keras._jax.devices import spread
from virtualbatch.keras._packing import (
    FEW_LENGTHS,
    Packing,
    PaddedBatch,
    checked_lengths,
    padded_batch,
)
from virtualbatch.window.packing import rounded


class PackedCut(Cut):
    """A batch cut by tokens."""

    @property
    def rows_in_order(self) -> list[Any]:
        """See `Cut`: rows are sorted by their length."""
        return [None] * self.count


@dataclass(frozen=True)
class PackedSegment(Segment):
    """Micro-batches with the same number of rows, each trimmed to one of a few lengths.

    Fields:
        branches: for each length, (index) -> the micro-batch trimmed to that length.
        branch: the branch of each micro-batch; int32 vector.
    """

    branches: tuple[Callable[[Any], Any], ...]
    branch: Any


def packed_cut(
    model: keras.Model, batch: Any, rows: int, packing: Packing, devices: int
) -> tuple[Cut, Callable[[Any], float], Any]:
    """Cuts a batch by tokens.

    Args:
        model: the model.
        batch: (x, y, sample_weight), traced or not.
        rows: its rows.
        packing: how rows are packed, on one device.
        devices: the number of devices over which a micro-batch is spread.

    Returns:
        The cut, longest rows first; a function that returns the stretch of a micro-batch (see
        `Rows`); and the row numbers in the order of the cut.
    """
    found = padded_batch(model, jax.tree.map(jnp.asarray, batch))
    lengths = jnp.asarray(checked_lengths(packing.lengths(batch[0]), rows))
    order = jnp.argsort(-lengths, stable=True)
    lengths = lengths[order]
    source = found.like(found.mapped(lambda leaf, trimmed: leaf[order]))
    # Sorting moves rows between devices, so each micro-batch must be spread again.
    move: Callable[[Any], Any] = spread if devices > 1 else lambda piece: piece
    step = -(-found.length // FEW_LENGTHS)
    few = sorted({rounded(n, step, found.length) for n in range(1, found.length + 1)})
    size = min(rows, devices * max(1, packing.tokens // found.length))
    first = rows % size
    segments = []
    if first:
        # The remainder takes the longest rows, which gain least from trimming.
        get = partial(_piece, source, move, 0, first, found.length)
        segments.append(Segment(1, first, get))
    branches = tuple(partial(_piece, source, move, first, size, length) for length in few)
    branch = jnp.searchsorted(jnp.asarray(few), lengths[first::size])
    # A length beyond the padded axis takes the last branch, which does not trim.
    branch = jnp.minimum(branch, len(few) - 1).astype(jnp.int32)

    def get_eagerly(index: Any) -> Any:
        return branches[int(branch[index])](index)

    segments.append(PackedSegment(rows // size, size, get_eagerly, branches, branch))
    place = found.trimmed.index(True)

    def stretch(microbatch: Any) -> float:
        length = found.like(microbatch).leaves[place].shape[1]
        return found.length / length if found.targets else 1.0

    return PackedCut(segments), stretch, order


def branches(segment: Segment) -> tuple[Callable[[Any], Any], ...]:
    """The functions that make a micro-batch of a segment, one for each shape."""
    return segment.branches if isinstance(segment, PackedSegment) else (segment.get,)


def chosen(segment: Segment, functions: Any, index: Any, *args: Any) -> Any:
    """Calls the function for a micro-batch's branch.

    Args:
        segment: the segment of the micro-batch.
        functions: one for each branch of the segment.
        index: the number of the micro-batch in the segment.
        *args: what the function gets.
    """
    if isinstance(segment, PackedSegment):
        return lax.switch(segment.branch[index], functions, *args)
    return functions[0](*args)


def _piece(
    batch: PaddedBatch,
    move: Callable[[Any], Any],
    first: int,
    size: int,
    length: int,
    index: Any,
) -> Any:
    def piece(leaf: Any, trimmed: bool) -> Any:
        rows = lax.dynamic_slice_in_dim(leaf, first + index * size, size)
        return rows[:, :length] if trimmed else rows

    return move(batch.mapped(piece))
