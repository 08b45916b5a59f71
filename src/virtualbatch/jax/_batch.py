"""A batch as segments: runs of micro-batches of equal shape, so that one loop can run them.

The loop makes each micro-batch from its index, so the batch is not copied. Un-jitted calls get
segments of one micro-batch each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from virtualbatch.jax._arrays import is_array, map_arrays
from virtualbatch.jax._rows import (
    map_lists,
    on_one_device,
    refuse_row_lists,
    rows_of,
    with_row_lists,
)
from virtualbatch.jax._segment import Cut, Segment
from virtualbatch.jax._windows import window_segments
from virtualbatch.window.cut import even_cut, rows_per_microbatch
from virtualbatch.window.row_list import shown
from virtualbatch.window.window import Window


def cut_batch(
    batch: Any,
    microbatch_size: int | None,
    accumulation_steps: int | None,
    *,
    compiled: bool,
    weighted: bool = False,
) -> Cut:
    """Cuts a batch, or takes a Window as it is cut.

    Args:
        batch: pytree of arrays that share their leading axis, or a Window of such.
        microbatch_size: checked rows of one micro-batch, or None; None for a Window.
        accumulation_steps: checked micro-batches per window, or None; None for a Window.
        compiled: whether the window becomes one program, which must have few shapes: equal
            micro-batches and one remainder. Otherwise sizes differ by at most one row.
        weighted: whether a weight says what a micro-batch counts. Then the rows of a Window need
            not be known. If they are not known, its micro-batches need not be alike.

    Returns:
        The cut. Micro-batches are contiguous rows. But if the rows of a batch are sharded over
        devices, every micro-batch takes rows from every device.

    Raises:
        ValueError: rows differ or are missing, the two sizes disagree, or a window is empty or
            holds micro-batches of different structures.
        ValueError: the batch is sharded over an explicit mesh, and a micro-batch would have fewer
            rows than there are devices.
        TypeError: a list as long as the batch would be cut in a compiled loop.
    """
    if isinstance(batch, Window):
        return Cut(window_segments(batch, compiled, weighted))
    rows = rows_of(batch, "batch")
    size = min(rows_per_microbatch(rows, microbatch_size, accumulation_steps), rows)
    if size == rows:
        return Cut([Segment(1, rows, lambda _: batch)])
    if compiled:
        refuse_row_lists(batch, rows, "inside a trace", "call outside of jax.jit")
    if any(_is_sharded(leaf) for leaf in jax.tree.leaves(batch)):
        devices = max(map(_explicit_devices, jax.tree.leaves(batch)))
        if size < devices:
            raise ValueError(
                "A micro-batch of a sharded batch must have a row on every device. "
                f"Got micro-batches of {size} rows and {devices} devices. "
                f"Pass microbatch_size={devices} or a multiple of it."
            )
        # Each device must give equally many rows. A given microbatch_size is rounded down, so that
        # memory suffices. Otherwise the size is rounded up, so that the steps are not exceeded.
        missing = -size % devices
        size += missing if microbatch_size is None else missing - devices if missing else 0
        return _interleaved(batch, rows, size, devices)
    if compiled:
        return _contiguous(batch, rows, size)
    return Cut(_evenly(batch, rows, size))


def cut_smaller(batch: Any, most: int) -> Cut:
    """Cuts a batch, or each micro-batch of a Window, outside a trace.

    Args:
        batch: a batch or a Window.
        most: the most rows of a micro-batch, >= 1.
    """
    if not isinstance(batch, Window):
        return cut_batch(batch, most, None, compiled=False)
    pieces = [
        piece
        for index, microbatch in enumerate(batch)
        for piece in _evenly(microbatch, rows_of(microbatch, f"window[{index}]"), most)
    ]
    return Cut(pieces)


def cut_into(batch: Any, sizes: Sequence[int]) -> Cut:
    """Micro-batches of known sizes, one after another, outside a trace.

    Args:
        batch: a batch, not a Window.
        sizes: the rows of each micro-batch. Their sum is the rows of the batch.
    """
    starts = accumulate(sizes[:-1], initial=0)
    pieces = zip(starts, sizes, strict=True)
    return Cut([Segment(1, rows, partial(_piece, batch, start, rows)) for start, rows in pieces])


def chosen(batch: Any, rows: np.ndarray) -> Any:
    """Some rows of a batch, by their numbers."""
    marked = with_row_lists(batch, rows_of(batch, "batch"))
    found = map_arrays(lambda x: jnp.asarray(on_one_device(x))[rows], marked)
    return map_lists(lambda x: x.chosen(rows).items, found)


def _is_sharded(leaf: Any) -> bool:
    """Whether the rows of an array are spread over devices, as far as its type or value shows."""
    if not isinstance(leaf, jax.Array):
        return False
    # Under jit a type knows its sharding only on meshes with explicit axes.
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    spec: Sequence[Any] = getattr(sharding, "spec", ())
    return len(spec) > 0 and spec[0] is not None


def _contiguous(batch: Any, rows: int, size: int) -> Cut:
    count, rest = divmod(rows, size)
    segments = [Segment(count, size, lambda index: _piece(batch, index * size, size))]
    if rest:
        segments.append(Segment(1, rest, partial(_piece, batch, count * size, rest)))
    return Cut(segments)


def _explicit_devices(leaf: Any) -> int:
    """The number of devices over which an array's rows are spread, as far as its type shows.

    On a mesh with explicit axes the rows of every piece must be a multiple of that number.
    """
    if not is_array(leaf):
        return 1
    kind = jax.typeof(leaf)
    return kind.shape[0] // kind.sharding.shard_shape(kind.shape)[0]


def _interleaved(batch: Any, rows: int, size: int, devices: int) -> Cut:
    """Micro-batches that have rows from every device."""
    count = -(-rows // size)
    # Equal micro-batches if possible. Otherwise micro-batches of the given size and a remainder.
    equal = rows % (count * devices) == 0
    size, count = (rows // count, count) if equal else (size, rows // size)
    whole = count * size

    def get(index: Any) -> Any:
        def pick(leaf: Any) -> Any:
            whole_part = lax.slice_in_dim(leaf, 0, whole)
            grid = whole_part.reshape(size, count, *leaf.shape[1:])
            return lax.dynamic_index_in_dim(grid, index, axis=1, keepdims=False)

        return map_arrays(pick, batch)

    segments = [Segment(count, size, get)]
    if rows > whole:
        segments.append(Segment(1, rows - whole, partial(_piece, batch, whole, rows - whole)))
    return Cut(segments, interleaved=True)


def _piece(batch: Any, start: Any, rows: int, index: Any = None) -> Any:
    del index

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and isinstance(start, int):
            return leaf[start : start + rows]
        return lax.dynamic_slice_in_dim(leaf, start, rows)

    return map_lists(lambda x: x.cut(start, start + rows), map_arrays(cut, batch))


def _evenly(batch: Any, rows: int, size: int) -> list[Segment]:
    """Micro-batches outside a trace, where each may have its own shape."""
    marked = with_row_lists(batch, rows)
    segments = []
    for start, stop in even_cut(rows, size):
        get = partial(_piece, marked, start, stop - start)
        if marked is batch:
            segments.append(Segment(1, stop - start, get))
        else:
            segments.append(Segment(1, stop - start, partial(_shown, get), marked=get))
    return segments


def _shown(marked: Callable[[Any], Any], index: Any) -> Any:
    return map_lists(shown, marked(index))
