"""A batch as segments: runs of micro-batches of one shape, where a number selects a micro-batch.

Eagerly every micro-batch is a segment of its own, and rows are cut as evenly as possible. In a
graph the rows are one long run of equal shapes, plus one remainder if the shapes are static.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from virtualbatch.tensorflow._arrays import (
    after,
    as_tensors,
    eager_rows,
    equal_rows,
    is_array,
    is_open,
    map_lists,
    map_rows,
    marked_if_any,
    marking,
    named_arrays,
    open_if_empty,
    refuse_sparse,
    row_counts,
    row_lists,
    with_row_lists,
)
from virtualbatch.tensorflow._segment import Segment, single
from virtualbatch.tensorflow._windows import window_segments
from virtualbatch.window.cut import even_cut, rows_per_microbatch, sizes_disagree
from virtualbatch.window.row_list import RowList
from virtualbatch.window.tree import common_rows
from virtualbatch.window.window import Window


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
            not be known. If they are not known, its micro-batches need not be alike.
        counted: whether rows are needed even if there is a weight.
        may_be_empty: whether, in a graph, a batch or micro-batches of a Window may have 0 rows.

    Returns:
        The segments in row order. A batch without rows is one micro-batch without rows.

    Raises:
        ValueError: rows differ or are missing, the two sizes disagree, or the window is empty.
        TypeError: a batch that must be cut holds a SparseTensor, or in a graph a list that is as
            long as the batch.
    """
    if isinstance(batch, Window):
        return window_segments(batch, weighted, counted, may_be_empty)
    if may_be_empty:
        batch = open_if_empty(batch)
    rows = common_rows(named_arrays(batch))
    refuse_sparse(batch)
    marked = marked_if_any(batch)
    if tf.executing_eagerly():
        size = rows_per_microbatch(eager_rows(rows), microbatch_size, accumulation_steps)
        cut = even_cut(eager_rows(rows), size)
        if marked is None:
            return [_piece(batch, start, stop) for start, stop in cut]
        marked = with_row_lists(marked, eager_rows(rows))
        return [_piece(marked, start, stop)._replace(holds_lists=True) for start, stop in cut]
    lists = [] if marked is None else row_lists(marked)
    batch = as_tensors(batch)
    if is_open(batch):
        counts = row_counts(batch)
        least = 0 if may_be_empty else 1
        batch, counts = after([equal_rows(counts, least)], (batch, counts))
        if rows is None:
            for found in lists:
                batch, counts = after([_no_row_list(found, counts[0])], (batch, counts))
            run = _dynamic_run(batch, counts[0], microbatch_size, accumulation_steps, least)
            return [run._replace(entries=counts[0] if may_be_empty else None)]
    size = rows_per_microbatch(rows, microbatch_size, accumulation_steps)
    if size >= rows:
        return [single(batch, rows)]
    if any(len(found) == rows for found in lists):
        raise TypeError(f"{_NO_LISTS} Got one beside {rows} rows. {_PASS_TENSOR}")
    full, rest = divmod(rows, size)
    result = [_static_run(batch, full, size)]
    if rest:
        result.append(single(map_rows(lambda x: _slice(x, full * size, rest), batch), rest))
    return result


def with_columns(segments: Sequence[Segment], columns: Sequence[Any]) -> list[Segment]:
    """The same micro-batches, each paired with its rows of some tensors.

    Args:
        segments: micro-batches whose rows are known now or at run time.
        columns: tensors with the rows of all micro-batches, in order.

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
    """Cuts a batch, or each micro-batch of a Window, eagerly.

    Args:
        batch: a batch or a Window.
        most: the most rows of a micro-batch, >= 1.
    """
    if not isinstance(batch, Window):
        return segments(batch, most, None)
    return [piece for microbatch in batch for piece in segments(microbatch, most, None)]


_NO_LISTS = "A list as long as the batch must be cut with it, but a graph cannot cut lists."


_PASS_TENSOR = (
    "Pass a tensor for it, pad it, or call outside of tf.function. See docs/guides/rows.md."
)


def chosen(batch: Any, rows: np.ndarray) -> Any:
    """Some rows of a batch of tensors, by their numbers, eagerly."""
    count = eager_rows(common_rows(named_arrays(batch)))
    found = map_rows(lambda x: tf.gather(x, rows), with_row_lists(marking(batch), count))
    return map_lists(lambda x: x.chosen(rows).items, found)


def _no_row_list(found: Any, rows: Any) -> Any:
    """An assertion for run time: a list is not as long as the batch."""
    return tf.debugging.Assert(
        tf.not_equal(rows, len(found)), [f"{_NO_LISTS} {_PASS_TENSOR} Got rows", rows]
    )


def _piece(batch: Any, start: int, stop: int) -> Segment:
    def cut(leaf: Any) -> Any:
        if isinstance(leaf, RowList):
            return leaf.cut(start, stop)
        if not is_array(leaf):
            return leaf
        # A DataFrame selects rows with iloc. Its brackets select columns.
        return leaf.iloc[start:stop] if hasattr(leaf, "iloc") else leaf[start:stop]

    return Segment(
        1, batch, lambda source, _: tf.nest.map_structure(cut, source), lambda _: stop - start
    )


def _slice(x: Any, start: Any, size: Any) -> Any:
    if isinstance(x, tf.RaggedTensor) or x.shape.rank is None:
        return x[start : start + size]
    dynamic = tf.shape(x)
    inner = [dynamic[k] if n is None else n for k, n in enumerate(x.shape) if k > 0]
    sliced = tf.slice(x, [start, *[0] * len(inner)], [size, *inner])
    # A Python number is a static size, which XLA and shape inference need.
    sliced.set_shape([size if isinstance(size, int) else None, *x.shape[1:]])
    return sliced


def _static_run(batch: Any, count: int, size: int) -> Segment:
    return Segment(
        count,
        batch,
        lambda source, i: map_rows(lambda x: _slice(x, i * size, size), source),
        lambda _: size,
    )


def _dynamic_run(
    batch: Any,
    rows: Any,
    microbatch_size: int | None,
    accumulation_steps: int | None,
    least: int,
) -> Segment:
    """Micro-batches of a batch whose rows are known only at run time.

    One shape with unknown rows serves the full micro-batches and the remainder. So the remainder is
    the last turn of the loop, and needs no trace of its own.
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
