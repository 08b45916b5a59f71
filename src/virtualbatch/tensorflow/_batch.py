"""A batch as segments: runs of micro-batches of one shape, each reached by its number.

Eagerly every micro-batch is a segment of one, cut as evenly as possible. In a graph the rows are
one long run of equal shapes, plus one remainder where the shapes are static.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.split import (
    Window,
    array_leaves,
    check_window,
    common_rows,
    even_cut,
    rows_per_microbatch,
    sizes_disagree,
)


class Segment(NamedTuple):
    """Micro-batches of one shape.

    Fields:
        count: how many; a Python int, or an int32 scalar where the rows are dynamic.
        get: number within the segment -> micro-batch.
        rows: number within the segment -> its rows, a Python int or an int32 scalar.
    """

    count: Any
    get: Callable[[Any], Any]
    rows: Callable[[Any], Any]


def segments(
    batch: Any, microbatch_size: int | None, accumulation_steps: int | None
) -> list[Segment]:
    """Cuts a batch, or takes a Window as it is cut.

    Args:
        batch: nested structure of arrays that share their leading axis, or a Window of such.
        microbatch_size: checked rows of one micro-batch, or None; None for a Window.
        accumulation_steps: checked micro-batches per window, or None; None for a Window.

    Returns:
        The segments in row order.

    Raises:
        ValueError: rows differ or are missing, the two sizes disagree, or the window is empty.
    """
    if isinstance(batch, Window):
        return _window_segments(batch)
    rows = common_rows(array_leaves(batch))
    if tf.executing_eagerly():
        size = rows_per_microbatch(_known(rows), microbatch_size, accumulation_steps)
        return [_piece(batch, start, stop) for start, stop in even_cut(_known(rows), size)]
    batch = tf.nest.map_structure(_as_tensor, batch)
    if rows is None:
        return [_dynamic_run(batch, microbatch_size, accumulation_steps)]
    size = rows_per_microbatch(rows, microbatch_size, accumulation_steps)
    if size >= rows:
        return [_single(batch, rows)]
    full, rest = divmod(rows, size)
    result = [_static_run(batch, full, size)]
    if rest:
        result.append(_single(map_rows(lambda x: _slice(x, full * size, rest), batch), rest))
    return result


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a batch has rows, rather than belonging to all of them."""
    return hasattr(leaf, "shape")


def map_rows(fn: Callable[[Any], Any], batch: Any) -> Any:
    """Applies fn to every array of a nested structure; other leaves stay."""
    return tf.nest.map_structure(lambda leaf: fn(leaf) if is_array(leaf) else leaf, batch)


def specs(microbatch: Any, rows: int | None = None) -> Any:
    """TensorSpecs of the arrays of a micro-batch, with another number of rows if one is given."""

    def spec(leaf: Any) -> Any:
        found = tf.type_spec_from_value(leaf)
        if rows is None or not isinstance(found, tf.TensorSpec):
            return found
        return tf.TensorSpec([rows, *found.shape[1:]], found.dtype)

    return map_rows(spec, microbatch)


def _known(rows: int | None) -> int:
    if rows is None:
        raise ValueError("internal: an eager batch has no number of rows.")
    return rows


def _as_tensor(leaf: Any) -> Any:
    if not is_array(leaf) or isinstance(leaf, tf.RaggedTensor):
        return leaf
    if isinstance(leaf, tf.SparseTensor):
        raise TypeError(
            "Arrays of a batch must be dense or ragged. Got a SparseTensor. "
            "Pass tf.sparse.to_dense(...), or a Window whose micro-batches you cut yourself."
        )
    return tf.convert_to_tensor(leaf)


def _piece(batch: Any, start: int, stop: int) -> Segment:
    def cut(leaf: Any) -> Any:
        if isinstance(leaf, tf.SparseTensor):
            return _as_tensor(leaf)
        # A frame is asked for rows by position; its own brackets mean columns.
        return leaf.iloc[start:stop] if hasattr(leaf, "iloc") else leaf[start:stop]

    return Segment(1, lambda _: map_rows(cut, batch), lambda _: stop - start)


def _single(microbatch: Any, rows: Any) -> Segment:
    return Segment(1, lambda _: microbatch, lambda _: rows)


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
        lambda i: map_rows(lambda x: _slice(x, i * size, size), batch),
        lambda _: size,
    )


def _dynamic_run(
    batch: Any, microbatch_size: int | None, accumulation_steps: int | None
) -> Segment:
    """Micro-batches of a batch whose rows are known at run time only.

    One shape with open rows serves the full micro-batches and the remainder, so the remainder is
    simply the last turn of the loop and nothing is traced for it.
    """
    arrays = [leaf for leaf in tf.nest.flatten(batch) if is_array(leaf)]
    counts = [x.nrows(tf.int32) if isinstance(x, tf.RaggedTensor) else tf.shape(x)[0] for x in arrays]
    rows = counts[0]
    same = tf.reduce_all(tf.equal(tf.stack(counts), rows))
    checks = [
        tf.debugging.Assert(
            tf.logical_and(same, rows > 0),
            [
                "All arrays of a batch must have the same number of rows, at least one. Got rows",
                tf.stack(counts),
                "in the order of tf.nest.flatten(batch). Pass arrays that share their leading axis.",
            ],
        )
    ]
    size = rows_per_microbatch(rows, microbatch_size, accumulation_steps)
    count = (rows + size - 1) // size
    if microbatch_size is not None and accumulation_steps is not None:
        checks.append(
            tf.debugging.Assert(
                tf.equal(count, accumulation_steps),
                [sizes_disagree("the batch", microbatch_size, accumulation_steps), "Got rows", rows],
            )
        )
    # Everything reads the batch through these, so nothing can run before the checks.
    with tf.control_dependencies([check for check in checks if check is not None]):
        batch = map_rows(tf.identity, batch)
        rows, size = tf.identity(rows), tf.identity(size)

    def rows_of(i: Any) -> Any:
        return tf.minimum(size, rows - i * size)

    return Segment(
        count, lambda i: map_rows(lambda x: _slice(x, i * size, rows_of(i)), batch), rows_of
    )


def _window_segments(window: Window) -> list[Segment]:
    check_window(window)
    result: list[Segment] = []
    run: list[Any] = []
    run_spec = None
    for index, microbatch in enumerate(window):
        rows = common_rows(array_leaves(microbatch, f"window[{index}]"))
        if tf.executing_eagerly():
            result.append(_single(microbatch, rows))
            continue
        microbatch = tf.nest.map_structure(_as_tensor, microbatch)
        spec = tf.nest.flatten(specs(microbatch)) if _stackable(microbatch) else None
        if run and (spec is None or spec != run_spec):
            result.append(_stacked(run))
            run = []
        run.append(microbatch)
        run_spec = spec
        if spec is None:
            result.append(_single(microbatch, _dynamic_rows(microbatch)))
            run = []
    return result + ([_stacked(run)] if run else [])


def _stackable(microbatch: Any) -> bool:
    return all(
        not isinstance(leaf, tf.RaggedTensor) and leaf.shape.is_fully_defined()
        for leaf in tf.nest.flatten(microbatch)
        if is_array(leaf)
    )


def _dynamic_rows(microbatch: Any) -> Any:
    leaf = next(leaf for leaf in tf.nest.flatten(microbatch) if is_array(leaf))
    return leaf.nrows(tf.int32) if isinstance(leaf, tf.RaggedTensor) else tf.shape(leaf)[0]


def _stacked(run: list[Any]) -> Segment:
    """Equal micro-batches of a Window, stacked so that one loop can index them."""
    rows = common_rows(array_leaves(run[0]))
    if len(run) == 1:
        return _single(run[0], rows)
    stacked = tf.nest.map_structure(
        lambda *leaves: tf.stack(leaves) if is_array(leaves[0]) else leaves[0], *run
    )
    return Segment(len(run), lambda i: map_rows(lambda x: x[i], stacked), lambda _: rows)
