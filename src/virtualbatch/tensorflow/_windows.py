"""A Window as segments: its micro-batches as given, with adjacent alike ones in one segment."""

import numbers
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._arrays import (
    after,
    arrays_of,
    as_tensors,
    eager_rows,
    equal_rows,
    is_array,
    is_open,
    map_rows,
    marked_if_any,
    marking,
    most_entries,
    named_arrays,
    open_if_empty,
    row_counts,
    specs,
    with_row_lists,
)
from virtualbatch.tensorflow._segment import Segment, single
from virtualbatch.window.row_list import RowList
from virtualbatch.window.tree import common_rows, rank
from virtualbatch.window.window import PASS_WEIGHT, Window, check_alike, check_window

# Classes of leaves that belong to every row.
_PLAIN = (numbers.Number, str, bytes, type(None), tf.DType)


def window_segments(
    window: Window, weighted: bool, counted: bool, may_be_empty: bool
) -> list[Segment]:
    """The micro-batches of a Window.

    Args:
        window: at least one micro-batch.
        weighted: as in `segments`.
        counted: as in `segments`.
        may_be_empty: as in `segments`.

    Raises:
        ValueError: the window is empty, rows differ or are missing, or structures differ.
        TypeError: arrays are hidden in an object that `tf.nest` does not flatten, or an array
            cannot be converted to a tensor.
    """
    check_window(window)
    if may_be_empty:
        window = Window(map(open_if_empty, window), sorted_rows=window.sorted_rows)
    if weighted and not all(_rows_are_told(found, counted) for found in window):
        if tf.executing_eagerly():
            return [single(microbatch, None) for microbatch in window]
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
    checks = [equal_rows(row_counts(found), least) for found in microbatches if is_open(found)]
    return _runs(after(checks, microbatches), True, may_be_empty)


def _rows_are_told(microbatch: Any, counted: bool) -> bool:
    """Whether rows of a micro-batch are known; or known at run time, and needed (`counted`)."""
    leaves = tf.nest.flatten(marking(microbatch))
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
    marked = marked_if_any(microbatch)
    if marked is None:
        return single(microbatch, rows)
    return single(with_row_lists(marked, eager_rows(rows)), rows)._replace(holds_lists=True)


def _runs(microbatches: Sequence[Any], counted: bool, may_be_empty: bool) -> list[Segment]:
    """Micro-batches of a Window in a graph. Adjacent ones of one shape become one segment."""
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
            rows = row_counts(microbatch)[0] if counted else None
            entries = most_entries(microbatch) if may_be_empty else None
            result.append(single(microbatch, rows)._replace(entries=entries))
    return result + ([_stacked(run, counted)] if run else [])


def _stackable(microbatch: Any) -> bool:
    return all(
        isinstance(leaf, tf.Tensor) and leaf.shape.is_fully_defined()
        for leaf in arrays_of(microbatch)
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
        return single(run[0], rows)
    stacked = tf.nest.map_structure(
        lambda *leaves: tf.stack(leaves) if is_array(leaves[0]) else leaves[0], *run
    )
    return Segment(
        len(run),
        stacked,
        lambda source, i: map_rows(lambda x: x[i], source),
        lambda _: rows,
    )
