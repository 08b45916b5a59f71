"""A batch as segments: runs of micro-batches of one shape, each reached by its number.

Eagerly every micro-batch is a segment of one, cut as evenly as possible. In a graph the rows are
one long run of equal shapes, plus one remainder where the shapes are static.
"""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from virtualbatch.window.cut import even_cut, rows_per_microbatch, sizes_disagree
from virtualbatch.window.row_list import RowList, is_list, shown
from virtualbatch.window.tree import array_leaves, common_rows, parts_of, rank
from virtualbatch.window.window import PASS_WEIGHT, Window, check_alike, check_window

# Classes of what belongs to every row.
_PLAIN = (numbers.Number, str, bytes, type(None), tf.DType)


class Segment(NamedTuple):
    """Micro-batches of one shape.

    Fields:
        count: how many; a Python int, or an int32 scalar where the rows are dynamic.
        source: nested structure of arrays that they are cut from.
        cut: (source, number within the segment) -> micro-batch.
        rows: number within the segment -> its rows, a Python int or an int32 scalar; None where a
            weight says what a micro-batch counts and its rows cannot be told.
        holds_lists: whether `cut` marks lists with one entry per row.
        entries: 0, at run time, where its first micro-batch has no rows; then there is no other.
            None where it is known to have some.
    """

    count: Any
    source: Any
    cut: Callable[[Any, Any], Any]
    rows: Callable[[Any], Any]
    holds_lists: bool = False
    entries: Any = None

    def get(self, i: Any) -> Any:
        """The micro-batch of that number."""
        found = self.cut(self.source, i)
        return _map_lists(shown, found) if self.holds_lists else found

    def with_rows(self, i: Any, rows: int) -> Any:
        """Specs of that micro-batch with another number of rows, lists with as many entries."""
        found = specs(tf.nest.map_structure(as_tensor, self.cut(self.source, i)), rows)
        return _map_lists(lambda x: shown(x.stretched(rows)), found) if self.holds_lists else found

    def after(self, operations: list[Any]) -> "Segment":
        """The same micro-batches, which cannot be read before the operations have run."""
        return self._replace(source=after(operations, self.source))


def segments(
    batch: Any,
    microbatch_size: int | None,
    accumulation_steps: int | None,
    weighted: bool = False,
    counted: bool = False,
    may_be_empty: bool = False,
) -> list[Segment]:
    """Cuts a batch, or takes a Window as it is cut.

    Args:
        batch: nested structure of arrays that share their leading axis, or a Window of such.
        microbatch_size: checked rows of one micro-batch, or None; None for a Window.
        accumulation_steps: checked micro-batches per window, or None; None for a Window.
        weighted: whether a weight says what a micro-batch counts. Then the rows of a Window need
            not be known, nor its micro-batches alike.
        counted: whether rows are asked for beside the weight.
        may_be_empty: whether a batch, or micro-batches of a Window, may have no rows in a graph.

    Returns:
        The segments in row order. A batch without rows is one micro-batch without rows.

    Raises:
        ValueError: rows differ or are missing, the two sizes disagree, or the window is empty.
        TypeError: a batch that is still to be cut holds a SparseTensor, or in a graph a list that
            is as long as the batch.
    """
    if isinstance(batch, Window):
        return _window_segments(batch, weighted, counted, may_be_empty)
    if may_be_empty:
        batch = _open_if_empty(batch)
    rows = common_rows(named_arrays(batch))
    _refuse_sparse(batch)
    marked = _marked(batch)
    if tf.executing_eagerly():
        size = rows_per_microbatch(_known(rows), microbatch_size, accumulation_steps)
        cut = even_cut(_known(rows), size)
        if marked is None:
            return [_piece(batch, start, stop) for start, stop in cut]
        marked = _with_rows(marked, _known(rows))
        return [_piece(marked, start, stop)._replace(holds_lists=True) for start, stop in cut]
    lists = [] if marked is None else _lists(marked)
    batch = as_tensors(batch)
    if _is_open(batch):
        counts = _counts(batch)
        least = 0 if may_be_empty else 1
        batch, counts = after([_equal_rows(counts, least)], (batch, counts))
        if rows is None:
            for found in lists:
                batch, counts = after([_no_row_list(found, counts[0])], (batch, counts))
            run = _dynamic_run(batch, counts[0], microbatch_size, accumulation_steps, least)
            return [run._replace(entries=counts[0] if may_be_empty else None)]
    size = rows_per_microbatch(rows, microbatch_size, accumulation_steps)
    if size >= rows:
        return [_single(batch, rows)]
    if any(len(found) == rows for found in lists):
        raise TypeError(f"{_NO_LISTS} Got one beside {rows} rows. {_PASS_TENSOR}")
    full, rest = divmod(rows, size)
    result = [_static_run(batch, full, size)]
    if rest:
        result.append(_single(map_rows(lambda x: _slice(x, full * size, rest), batch), rest))
    return result


def with_columns(segments: Sequence[Segment], columns: Sequence[Any]) -> list[Segment]:
    """The same micro-batches, each beside its rows of some tensors.

    Args:
        segments: micro-batches whose rows are known, or will be.
        columns: tensors with the rows of all of them, in order.

    Returns:
        Segments of pairs: a micro-batch, and a list of its rows of each tensor.
    """
    found = []
    offset: Any = 0
    for segment in segments:
        found.append(_with_columns(segment, list(columns), offset))
        offset = offset + segment.count * segment.rows(0)
    return found


def _with_columns(segment: Segment, columns: list[Any], offset: Any) -> Segment:
    size = segment.rows(0)

    def cut(source: Any, i: Any) -> Any:
        start = offset + i * size
        return segment.cut(source[0], i), [_slice(x, start, segment.rows(i)) for x in source[1]]

    return segment._replace(source=(segment.source, columns), cut=cut)


def smaller_segments(batch: Any, most: int) -> list[Segment]:
    """The same micro-batches, eagerly, with no more rows than that; those of a Window are cut.

    Args:
        batch: a batch or a Window.
        most: rows of a micro-batch, >= 1.
    """
    if not isinstance(batch, Window):
        return segments(batch, most, None)
    return [piece for microbatch in batch for piece in segments(microbatch, most, None)]


_NO_LISTS = "A list as long as the batch is cut with it, which a graph cannot do."
_PASS_TENSOR = "Pass a tensor for it, pad it, or call outside of tf.function. See docs/rows.md."


def chosen(batch: Any, rows: np.ndarray) -> Any:
    """Some rows of a batch of tensors, by their numbers, eagerly."""
    count = _known(common_rows(named_arrays(batch)))
    found = map_rows(lambda x: tf.gather(x, rows), _with_rows(_marking(batch), count))
    return _map_lists(lambda x: x.chosen(rows).items, found)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a batch has rows, rather than belonging to all of them."""
    return hasattr(leaf, "shape")


def map_rows(fn: Callable[[Any], Any], batch: Any) -> Any:
    """Applies fn to every array of a nested structure; other leaves stay."""
    return tf.nest.map_structure(lambda leaf: fn(leaf) if is_array(leaf) else leaf, batch)


def as_tensor(leaf: Any) -> Any:
    """An array as a tensor; ragged and sparse tensors and leaves without rows stay."""
    if not is_array(leaf) or isinstance(leaf, tf.RaggedTensor | tf.SparseTensor):
        return leaf
    return tf.convert_to_tensor(leaf)


def as_tensors(batch: Any) -> Any:
    """The batch with its arrays as tensors; lists stay."""
    found = tf.nest.map_structure(as_tensor, _marking(batch))
    return _map_lists(lambda x: x.items, found)


def after(operations: list[Any], structure: Any) -> Any:
    """The same arrays, which cannot be read before the operations have run."""
    with tf.control_dependencies([found for found in operations if found is not None]):
        return map_rows(tf.identity, structure)


def specs(microbatch: Any, rows: int | None = None) -> Any:
    """Specs of the arrays of a micro-batch, with another number of rows if one is given."""

    def spec(leaf: Any) -> Any:
        found = tf.type_spec_from_value(leaf)
        if rows is None:
            return found
        shape = tf.TensorShape([rows]).concatenate(found.shape[1:])
        if isinstance(found, tf.RaggedTensorSpec):
            return tf.RaggedTensorSpec(
                shape, found.dtype, found.ragged_rank, found.row_splits_dtype
            )
        return type(found)(shape, found.dtype)

    return map_rows(spec, microbatch)


def named_arrays(batch: Any, path: str = "batch", or_else: str = "") -> list[tuple[str, Any]]:
    """Every array of a batch, with the expression that reaches it.

    Args:
        batch: nested structure.
        path: what errors call it.
        or_else: what errors say at their end.
    """
    marked = _marking(batch)
    named, seen = array_leaves(marked, path), _arrays(marked)
    if len(named) == len(seen):
        return named
    known = set(map(id, seen))
    for place, leaf in named:
        if id(leaf) not in known:
            raise TypeError(
                "Arrays of a batch must be where tf.nest finds them. "
                f"Got {place} inside of something else. "
                "Pass a dict, or give its class TensorFlow's nest protocol (__tf_flatten__)."
                f"{or_else}"
            )
    # TensorFlow also looks into attrs classes and into those with its nest protocol.
    flat = tf.nest.flatten(marked)
    return [(f"tf.nest.flatten({path})[{i}]", x) for i, x in enumerate(flat) if is_array(x)]


def _arrays(batch: Any) -> list[Any]:
    return [leaf for leaf in tf.nest.flatten(batch) if is_array(leaf)]


def _is_open(batch: Any) -> bool:
    """Whether a trace does not know the rows of some array."""
    return any(rank(array) is None or array.shape[0] is None for array in _arrays(batch))


def _counts(batch: Any) -> Any:
    """Rows of every array of a batch, as an int32 vector in a graph."""

    def count(array: Any) -> Any:
        if isinstance(array, tf.RaggedTensor):
            return array.nrows(tf.int32)
        if isinstance(array, tf.SparseTensor):
            return tf.cast(array.dense_shape[0], tf.int32)
        return tf.shape(array)[0]

    return tf.stack([count(array) for array in _arrays(batch)])


def _entries(microbatch: Any) -> Any:
    """The most entries that an array has at run time; None if one is known to have some."""
    arrays = [array for array in _arrays(microbatch) if rank(array) != 0]
    if not arrays or any(rank(array) and array.shape[0] is not None for array in arrays):
        return None
    return tf.reduce_max(_counts(arrays))


def count_rows(microbatch: Any) -> Any:
    """The rows of a micro-batch at run time, as an int32 scalar."""
    return _counts(microbatch)[0]


def _no_row_list(found: Any, rows: Any) -> Any:
    """Refuses, at run time, a list that turns out to be as long as the batch."""
    return tf.debugging.Assert(
        tf.not_equal(rows, len(found)), [f"{_NO_LISTS} {_PASS_TENSOR} Got rows", rows]
    )


def _marked(batch: Any) -> Any:
    """The batch with every list without an array as one `RowList`; None if there are none."""
    found = _marking(batch)
    return None if found is batch else found


def _marking(part: Any) -> Any:
    if is_list(part):
        return RowList(part)
    # tf.nest does not look into all that has parts.
    parts = parts_of(part) if isinstance(part, list | tuple | Mapping) else None
    if parts is None:
        return part
    items, join = parts
    found = [_marking(item) for _, item in items]
    alike = all(new is item for new, (_, item) in zip(found, items, strict=True))
    return part if alike else join(found)


def _lists(marked: Any) -> list[Any]:
    return [leaf.items for leaf in tf.nest.flatten(marked) if isinstance(leaf, RowList)]


def _with_rows(marked: Any, rows: int) -> Any:
    """Only those lists marked that have one entry per row."""
    return _map_lists(lambda x: x if len(x.items) == rows else x.items, marked)


def _map_lists(fn: Callable[[RowList], Any], batch: Any) -> Any:
    return tf.nest.map_structure(lambda x: fn(x) if isinstance(x, RowList) else x, batch)


def _known(rows: int | None) -> int:
    if rows is None:
        raise ValueError("internal: an eager batch has no number of rows.")
    return rows


def _refuse_sparse(batch: Any) -> None:
    if any(isinstance(leaf, tf.SparseTensor) for leaf in _arrays(batch)):
        raise TypeError(
            "Arrays of a batch must be dense or ragged. Got a SparseTensor. "
            "Pass tf.sparse.to_dense(...), or a Window whose micro-batches you cut yourself."
        )


def _piece(batch: Any, start: int, stop: int) -> Segment:
    def cut(leaf: Any) -> Any:
        if isinstance(leaf, RowList):
            return leaf.cut(start, stop)
        if not is_array(leaf):
            return leaf
        # A frame is asked for rows by position; its own brackets mean columns.
        return leaf.iloc[start:stop] if hasattr(leaf, "iloc") else leaf[start:stop]

    return Segment(
        1, batch, lambda source, _: tf.nest.map_structure(cut, source), lambda _: stop - start
    )


def _single(microbatch: Any, rows: Any) -> Segment:
    return Segment(1, microbatch, lambda source, _: source, lambda _: rows)


def _slice(x: Any, start: Any, size: Any) -> Any:
    if isinstance(x, tf.RaggedTensor) or x.shape.rank is None:
        return x[start : start + size]
    dynamic = tf.shape(x)
    inner = [dynamic[k] if n is None else n for k, n in enumerate(x.shape) if k > 0]
    sliced = tf.slice(x, [start, *[0] * len(inner)], [size, *inner])
    # Python numbers as sizes are static, and XLA and shape inference want to know them.
    sliced.set_shape([size if isinstance(size, int) else None, *x.shape[1:]])
    return sliced


def _static_run(batch: Any, count: int, size: int) -> Segment:
    return Segment(
        count,
        batch,
        lambda source, i: map_rows(lambda x: _slice(x, i * size, size), source),
        lambda _: size,
    )


def _open_if_empty(batch: Any) -> Any:
    """The batch, whose arrays without rows have rows that a trace does not know.

    So that nothing is traced for no rows, where a shape may not even be possible.
    """

    def opened(tensor: Any) -> Any:
        return tf.compat.v1.placeholder_with_default(tensor, [None, *tensor.shape[1:]])

    def leaf_or_open(leaf: Any) -> Any:
        if rank(leaf) in (None, 0) or leaf.shape[0] != 0:
            return leaf
        if isinstance(leaf, tf.RaggedTensor):
            splits = map(opened, leaf.nested_row_splits)
            values = opened(leaf.flat_values)
            return tf.RaggedTensor.from_nested_row_splits(values, list(splits), validate=False)
        return leaf if isinstance(leaf, tf.SparseTensor) else opened(tf.convert_to_tensor(leaf))

    return map_rows(leaf_or_open, batch)


def _equal_rows(counts: Any, least: int = 1) -> Any:
    """Refuses, at run time, the rows that a trace leaves open; those it knows were compared."""
    return tf.debugging.Assert(
        tf.logical_and(tf.reduce_all(tf.equal(counts, counts[0])), counts[0] > least - 1),
        [
            f"All arrays of a batch must have the same number of rows{', at least one' * least}. "
            "Got rows",
            counts,
            "in the order of tf.nest.flatten(batch). Pass arrays that share their leading axis.",
        ],
    )


def _dynamic_run(
    batch: Any,
    rows: Any,
    microbatch_size: int | None,
    accumulation_steps: int | None,
    least: int,
) -> Segment:
    """Micro-batches of a batch whose rows are known at run time only.

    One shape with open rows serves the full micro-batches and the remainder, so the remainder is
    simply the last turn of the loop and nothing is traced for it.
    """
    size = rows_per_microbatch(rows, microbatch_size, accumulation_steps)
    if least == 0:
        size = tf.maximum(size, 1)
    count = (rows + size - 1) // size
    if least == 0:
        count = tf.maximum(count, 1)
    if microbatch_size is not None and accumulation_steps is not None:
        disagree = sizes_disagree("the batch", microbatch_size, accumulation_steps)
        agree = tf.equal(count, accumulation_steps)
        if least == 0:
            agree = tf.logical_or(agree, tf.equal(rows, 0))
        check = tf.debugging.Assert(agree, [disagree, "Got rows", rows])
        batch, rows = after([check], (batch, rows))

    def rows_of(i: Any) -> Any:
        return tf.minimum(size, rows - i * size)

    return Segment(
        count,
        batch,
        lambda source, i: map_rows(lambda x: _slice(x, i * size, rows_of(i)), source),
        rows_of,
    )


def _window_segments(
    window: Window, weighted: bool, counted: bool, may_be_empty: bool
) -> list[Segment]:
    check_window(window)
    if may_be_empty:
        window = Window(map(_open_if_empty, window), sorted_rows=window.sorted_rows)
    if weighted and not all(_rows_are_told(found, counted) for found in window):
        if tf.executing_eagerly():
            return [_single(microbatch, None) for microbatch in window]
        return _runs(list(map(as_tensors, window)), False, may_be_empty)
    arrays = [named_arrays(found, f"window[{i}]", PASS_WEIGHT) for i, found in enumerate(window)]
    rows = [common_rows(found, PASS_WEIGHT) for found in arrays]
    check_alike(
        [
            [f"microbatch{name.removeprefix(f'window[{i}]')} an array" for name, _ in found]
            for i, found in enumerate(arrays)
        ]
    )
    if tf.executing_eagerly():
        return [_as_it_is(found, n) for found, n in zip(window, rows, strict=True)]
    microbatches = list(map(as_tensors, window))
    least = 0 if may_be_empty else 1
    checks = [_equal_rows(_counts(found), least) for found in microbatches if _is_open(found)]
    return _runs(after(checks, microbatches), True, may_be_empty)


def _rows_are_told(microbatch: Any, counted: bool) -> bool:
    """Whether the rows of a micro-batch are known, or will be and are asked for."""
    leaves = tf.nest.flatten(_marking(microbatch))
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    if len(arrays) + sum(isinstance(x, (*_PLAIN, RowList)) for x in leaves) < len(leaves):
        return False
    if any(rank(leaf) == 0 for leaf in arrays):
        return False
    sizes = {None if rank(leaf) is None else leaf.shape[0] for leaf in arrays}
    known = sizes - {None}
    return len(known) < 2 and 0 not in known and bool(sizes) and (counted or None not in sizes)


def _as_it_is(microbatch: Any, rows: Any) -> Segment:
    """A micro-batch of a Window, eagerly."""
    marked = _marked(microbatch)
    if marked is None:
        return _single(microbatch, rows)
    return _single(_with_rows(marked, _known(rows)), rows)._replace(holds_lists=True)


def _runs(microbatches: Sequence[Any], counted: bool, may_be_empty: bool) -> list[Segment]:
    """Micro-batches of a Window in a graph, those of one shape that follow each other as one."""
    result: list[Segment] = []
    run: list[Any] = []
    for microbatch in microbatches:
        stackable = _stackable(microbatch)
        if run and not (stackable and _alike(specs(run[0]), specs(microbatch))):
            result.append(_stacked(run, counted))
            run = []
        if stackable:
            run.append(microbatch)
        else:
            rows = _counts(microbatch)[0] if counted else None
            entries = _entries(microbatch) if may_be_empty else None
            result.append(_single(microbatch, rows)._replace(entries=entries))
    return result + ([_stacked(run, counted)] if run else [])


def _stackable(microbatch: Any) -> bool:
    return all(
        isinstance(leaf, tf.Tensor) and leaf.shape.is_fully_defined()
        for leaf in _arrays(microbatch)
    )


def _alike(a: Any, b: Any) -> bool:
    try:
        tf.nest.assert_same_structure(a, b)
    except (TypeError, ValueError):
        return False
    return tf.nest.flatten(a) == tf.nest.flatten(b)


def _stacked(run: list[Any], counted: bool) -> Segment:
    """Equal micro-batches of a Window, stacked so that one loop can index them."""
    rows = common_rows(named_arrays(run[0])) if counted else None
    if len(run) == 1:
        return _single(run[0], rows)
    stacked = tf.nest.map_structure(
        lambda *leaves: tf.stack(leaves) if is_array(leaves[0]) else leaves[0], *run
    )
    return Segment(
        len(run),
        stacked,
        lambda source, i: map_rows(lambda x: x[i], source),
        lambda _: rows,
    )
