"""A Window as segments: its micro-batches as given, with adjacent alike ones stacked."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.jax._arrays import is_array, map_arrays
from virtualbatch.jax._rows import is_row_list, rows_if_told, rows_of, with_row_lists
from virtualbatch.jax._segment import Segment
from virtualbatch.window.window import PASS_WEIGHT, Window, check_alike, check_window


def window_segments(window: Window, compiled: bool, weighted: bool) -> list[Segment]:
    """The micro-batches of a Window.

    Args:
        window: at least one micro-batch.
        compiled: as in `cut_batch`.
        weighted: as in `cut_batch`.

    Raises:
        ValueError: the window is empty, rows differ or are missing, or structures differ.
    """
    check_window(window)
    rows: list[int | None] = [None] * len(window)
    if not weighted or None not in map(rows_if_told, window):
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
    marked = microbatch if rows is None else with_row_lists(microbatch, rows)
    if marked is microbatch:
        return Segment(1, rows, lambda _: microbatch)
    return Segment(1, rows, lambda _: microbatch, marked=lambda _: marked)


def _kinds(microbatch: Any) -> tuple[Any, list[Any]]:
    """A key that agrees for micro-batches that can be stacked. Other leaves count by identity."""
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
    leaves, _ = tree_flatten_with_path(microbatch, is_leaf=is_row_list)
    return [
        f"microbatch{keystr(place)} "
        + ("an array" if is_array(leaf) else f"of type {type(leaf).__name__}")
        for place, leaf in leaves
    ]
