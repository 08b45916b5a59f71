"""A batch as segments: runs of micro-batches of equal shape that one loop can go through.

A micro-batch is made when it is asked for, by an index inside the loop, so that the batch is not
copied. Un-jitted calls get segments of one micro-batch each.
"""

import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.jax._arrays import is_array, map_arrays, on_host
from virtualbatch.window.cut import even_cut, rows_per_microbatch
from virtualbatch.window.row_list import RowList, is_list, shown
from virtualbatch.window.tree import array_leaves, common_rows, rows_if_shared
from virtualbatch.window.window import PASS_WEIGHT, Window, check_alike, check_window

# Classes of what belongs to every row.
_PLAIN = (numbers.Number, str, bytes, type(None))


@dataclass(frozen=True)
class Segment:
    """Micro-batches of equal shape.

    Fields:
        count: how many.
        rows: rows of each; a Python int, or None where a weight says what a micro-batch counts
            and its rows cannot be told.
        get: (index, an int or a traced int32 scalar) -> that micro-batch.
        marked: the same, where a `RowList` stands for each list with one entry per row; None where
            there are no such lists.
    """

    count: int
    rows: Any
    get: Callable[[Any], Any]
    marked: Callable[[Any], Any] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Cut:
    """A window, cut.

    Fields:
        segments: its micro-batches, in the order in which they run.
        interleaved: whether micro-batch i of the first segment has every count-th row from row i
            on, instead of the next rows.
    """

    segments: list[Segment]
    interleaved: bool = False

    @property
    def count(self) -> int:
        """Micro-batches of the window."""
        return sum(segment.count for segment in self.segments)

    @property
    def rows(self) -> list[Any]:
        """Rows of each micro-batch, None where they cannot be told."""
        return [segment.rows for segment in self.segments for _ in range(segment.count)]

    def microbatches(self) -> Iterator[Any]:
        """The micro-batches, one after another, each made when it is asked for."""
        for segment in self.segments:
            for k in range(segment.count):
                yield segment.get(k)


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
        compiled: whether the window becomes one program, which wants few shapes: equal
            micro-batches and one remainder. Otherwise sizes differ by at most one row.
        weighted: whether a weight says what a micro-batch counts. Then the rows of a Window need
            not be known, nor its micro-batches alike.

    Returns:
        The cut. It is contiguous, but for batches that are sharded over devices by rows: there
        every micro-batch takes rows of every device.

    Raises:
        ValueError: rows differ or are missing, the two sizes disagree, a window is empty or
            holds micro-batches of different structures, or a micro-batch of a batch that is
            sharded over an explicit mesh would have fewer rows than there are devices.
        TypeError: a list as long as the batch would be cut in a compiled loop.
    """
    if isinstance(batch, Window):
        return Cut(_window_segments(batch, compiled, weighted))
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
        # Rows of every device alike: no more than fit, or no more micro-batches than asked for.
        missing = -size % devices
        size += missing if microbatch_size is None else missing - devices if missing else 0
        return _interleaved(batch, rows, size, devices)
    if compiled:
        return _contiguous(batch, rows, size)
    return Cut(_evenly(batch, rows, size))


def cut_smaller(batch: Any, most: int) -> Cut:
    """The same micro-batches, outside a trace, with no more rows than that; a Window is cut.

    Args:
        batch: a batch or a Window.
        most: rows of a micro-batch, >= 1.
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
        sizes: rows of each; together those of the batch.
    """
    starts = accumulate(sizes[:-1], initial=0)
    pieces = zip(starts, sizes, strict=True)
    return Cut([Segment(1, rows, partial(_piece, batch, start, rows)) for start, rows in pieces])


def rows_of(batch: Any, path: str, or_else: str = "") -> int:
    """Rows that all arrays of a batch share.

    Args:
        batch: pytree.
        path: what errors call it.
        or_else: what errors say at their end.

    Raises:
        ValueError: rows differ or are missing.
        TypeError: arrays are hidden in what is no pytree.
    """
    leaves, _ = tree_flatten_with_path(batch, is_leaf=_is_list)
    for place, leaf in leaves:
        hidden = _hidden(leaf, path + keystr(place))
        if hidden:
            raise TypeError(
                "Arrays of a batch must be where JAX finds them. "
                f"Got {hidden[0][0]} inside of {type(leaf).__name__}, which is no pytree. "
                f"Pass a dict, or register the class: jax.tree_util.register_dataclass.{or_else}"
            )
    arrays = [(path + keystr(place), leaf) for place, leaf in leaves if is_array(leaf)]
    rows = common_rows(arrays, or_else)
    if rows is None:
        raise ValueError("internal: an array has no number of rows.")
    return rows


def _rows_if_told(microbatch: Any) -> int | None:
    """Rows of a micro-batch of a Window; None where its arrays share none, or may be hidden."""
    leaves = jax.tree.leaves(microbatch, is_leaf=_is_list)
    if not all(is_array(x) or isinstance(x, _PLAIN) or _is_list(x) for x in leaves):
        return None
    return rows_if_shared(("", leaf) for leaf in leaves if is_array(leaf))


def _hidden(leaf: Any, path: str) -> list[tuple[str, Any]]:
    return [] if hasattr(leaf, "shape") else array_leaves(leaf, path)


def _is_list(node: Any) -> bool:
    """Whether a node of a pytree is one leaf: see `is_list`. Registered classes may hold arrays."""
    return is_list(node) and not any(hasattr(x, "shape") for x in jax.tree.leaves(node))


def refuse_row_lists(batch: Any, rows: int, where: str, instead: str) -> None:
    """Refuses lists with one entry per row, which no compiled program can cut.

    Args:
        batch: pytree.
        rows: its rows.
        where: where the program is.
        instead: what to do if no array can stand for the list.

    Raises:
        TypeError: there is one.
    """
    if _with_row_lists(batch, rows) is not batch:
        raise TypeError(
            "A list as long as the batch is cut with it, which a compiled program cannot do. "
            f"Got one beside {rows} rows, {where}. Pass an array for it, or {instead}. "
            "See docs/rows.md."
        )


def _with_row_lists(batch: Any, rows: int) -> Any:
    """The batch with its lists marked that have one entry per row; itself if there are none."""
    found = [x for x in jax.tree.leaves(batch, is_leaf=_is_list) if isinstance(x, list | tuple)]
    if not any(len(leaf) == rows for leaf in found):
        return batch
    return jax.tree.map(
        lambda x: RowList(x) if isinstance(x, list | tuple) and len(x) == rows else x,
        batch,
        is_leaf=_is_list,
    )


def _map_lists(fn: Callable[[RowList], Any], batch: Any) -> Any:
    return jax.tree.map(lambda leaf: fn(leaf) if isinstance(leaf, RowList) else leaf, batch)


def chosen(batch: Any, rows: np.ndarray) -> Any:
    """Some rows of a batch, by their numbers."""
    marked = _with_row_lists(batch, rows_of(batch, "batch"))
    found = map_arrays(lambda x: jnp.asarray(on_one_device(x))[rows], marked)
    return _map_lists(lambda x: x.chosen(rows).items, found)


def on_one_device(x: Any) -> Any:
    """The array, brought to the host if it is spread over devices."""
    # On an explicit mesh some of its rows would have no place.
    if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
        return x
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(x)
    return jax.random.wrap_key_data(on_host(x), impl=jax.random.key_impl(x))


def specs(segment: Segment, rows: int) -> Any:
    """A micro-batch as it would be with another number of rows: types in place of its arrays."""

    def spec(leaf: Any) -> Any:
        found = jax.typeof(leaf)
        return found.update(shape=(rows, *found.shape[1:]))

    result: list[Any] = []
    # Abstractly, so that no micro-batch is made for it.
    get = segment.marked or segment.get
    jax.eval_shape(lambda: result.append(map_arrays(spec, get(0))))
    return _map_lists(lambda x: shown(x.stretched(rows)), result[0])


def _is_sharded(leaf: Any) -> bool:
    """Whether the rows of an array are spread over devices, as far as its type or value tells."""
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
    """Over how many devices the rows of an array are spread, as far as its type tells.

    On a mesh with explicit axes the rows of whatever is cut from it must be a multiple of that.
    """
    if not is_array(leaf):
        return 1
    kind = jax.typeof(leaf)
    return kind.shape[0] // kind.sharding.shard_shape(kind.shape)[0]


def _interleaved(batch: Any, rows: int, size: int, devices: int) -> Cut:
    """Micro-batches that have rows of every device."""
    count = -(-rows // size)
    # Equal ones if that can be, else as large as asked for, and a remainder.
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

    return _map_lists(lambda x: x.cut(start, start + rows), map_arrays(cut, batch))


def _window_segments(window: Window, compiled: bool, weighted: bool) -> list[Segment]:
    check_window(window)
    rows: list[int | None] = [None] * len(window)
    if not weighted or None not in map(_rows_if_told, window):
        rows = [rows_of(x, f"window[{i}]", PASS_WEIGHT) for i, x in enumerate(window)]
        check_alike([_places(found) for found in window])
    if not compiled:
        return [_as_it_is(found, n) for n, found in zip(rows, window, strict=True)]
    segments = []
    for _, group in groupby(zip(rows, window, strict=True), key=lambda pair: _kinds(pair[1])):
        counts, run = zip(*group, strict=True)
        segments.append(Segment(len(run), counts[0], _stacked(run)))
    return segments


def _as_it_is(microbatch: Any, rows: int | None) -> Segment:
    marked = microbatch if rows is None else _with_row_lists(microbatch, rows)
    if marked is microbatch:
        return Segment(1, rows, lambda _: microbatch)
    return Segment(1, rows, lambda _: microbatch, marked=lambda _: marked)


def _evenly(batch: Any, rows: int, size: int) -> list[Segment]:
    """Micro-batches outside of a trace, where each may have its own shape."""
    marked = _with_row_lists(batch, rows)
    segments = []
    for start, stop in even_cut(rows, size):
        get = partial(_piece, marked, start, stop - start)
        if marked is batch:
            segments.append(Segment(1, stop - start, get))
        else:
            segments.append(Segment(1, stop - start, partial(_shown, get), marked=get))
    return segments


def _shown(marked: Callable[[Any], Any], index: Any) -> Any:
    return _map_lists(shown, marked(index))


def _kinds(microbatch: Any) -> tuple[Any, list[Any]]:
    """What micro-batches must have in common to be stacked; other leaves by identity."""
    leaves, structure = jax.tree.flatten(microbatch)
    return structure, [
        (leaf.shape, str(leaf.dtype)) if is_array(leaf) else id(leaf) for leaf in leaves
    ]


def _stacked(run: Sequence[Any]) -> Callable[[Any], Any]:
    if len(run) == 1:
        return lambda _: run[0]
    stack = jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if is_array(leaves[0]) else leaves[0], *run
    )
    return lambda index: map_arrays(
        lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack
    )


def _places(microbatch: Any) -> list[str]:
    leaves, _ = tree_flatten_with_path(microbatch, is_leaf=_is_list)
    return [
        f"microbatch{keystr(place)} "
        + ("an array" if is_array(leaf) else f"of type {type(leaf).__name__}")
        for place, leaf in leaves
    ]
