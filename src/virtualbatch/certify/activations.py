"""Where rows first meet: values of a run on some rows, against those of its parts.

What a model computes row by row is the same whichever rows run together. The first value along a
run for which that fails is where rows are coupled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Activation(NamedTuple):
    """One value that a run computed.

    Fields:
        where: the layer and the line, in words.
        layer: class of the innermost layer, or an empty text.
        value: the value; any shape.
    """

    where: str
    layer: str
    value: np.ndarray


def first_difference(
    whole: Sequence[Activation], parts: Sequence[Sequence[Activation]], tolerance: float
) -> Activation | None:
    """The first value of a run that its parts do not compute alike, row by row.

    Values without an axis of rows are passed over: a sum over rows differs, and should.

    Args:
        whole: values of a run on all rows, in order.
        parts: values of runs on consecutive groups of these rows.
        tolerance: relative difference that is put down to rounding.

    Returns:
        The record of `whole`, or None if all agree.
    """
    for index, record in enumerate(whole):
        if any(index >= len(part) for part in parts):
            return record
        pieces = [part[index].value for part in parts]
        if not _agree(record.value, pieces, tolerance):
            return record
    return None


def reduced_at(
    whole: Sequence[Activation], parts: Sequence[Sequence[Activation]]
) -> Activation | None:
    """The last value that has no axis of rows although the one before it has.

    That is where a loss is reduced to a number.

    Args:
        whole: values of a run on all rows, in order.
        parts: values of runs on consecutive groups of these rows.
    """
    found = None
    had_rows = False
    for index, record in enumerate(whole):
        if any(index >= len(part) for part in parts):
            return found
        has_rows = record.value.shape != parts[0][index].value.shape
        if had_rows and not has_rows:
            found = record
        had_rows = has_rows
    return found


def first_not_finite(
    activations: Sequence[Activation], rows: int
) -> tuple[Activation, list[int]] | None:
    """The first value that holds NaN or infinity, and the rows of it that do.

    Args:
        activations: values of a run, in order.
        rows: rows of the run.

    Returns:
        The record and its rows (none where it has no axis of rows), or None.
    """
    for record in activations:
        bad = ~np.isfinite(record.value)
        # Masks of attention hold minus infinity on purpose.
        if not np.any(bad & ~np.isneginf(record.value)):
            continue
        if bad.ndim == 0 or bad.shape[0] % rows:
            return record, []
        per_row = bad.reshape(rows, -1).any(axis=1)
        return record, np.flatnonzero(per_row).tolist()
    return None


def same_values(first: Activation, second: Activation, tolerance: float) -> bool:
    """Whether two runs on the same rows computed the same value."""
    return first.value.shape == second.value.shape and _close(first.value, second.value, tolerance)


def _agree(whole: np.ndarray, parts: list[np.ndarray], tolerance: float) -> bool:
    if whole.ndim != parts[0].ndim:
        return False
    axes = [
        axis
        for axis in range(whole.ndim)
        if any(part.shape[axis] != whole.shape[axis] for part in parts)
    ]
    if not axes:
        return True
    if len(axes) > 1 or sum(part.shape[axes[0]] for part in parts) != whole.shape[axes[0]]:
        return False
    axis = axes[0]
    if _close(whole, np.concatenate(parts, axis), tolerance):
        return True
    # Rows may have been folded into an axis behind another one, such as time.
    rows = np.gcd.reduce([part.shape[axis] for part in parts])
    return any(
        _close(whole, _inner(parts, axis, outer), tolerance)
        for outer in range(2, rows + 1)
        if rows % outer == 0
    )


def _inner(parts: list[np.ndarray], axis: int, outer: int) -> np.ndarray:
    split = [part.reshape(*part.shape[:axis], outer, -1, *part.shape[axis + 1 :]) for part in parts]
    joined = np.concatenate(split, axis + 1)
    return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.all(same | finite):
        return False
    scale = np.max(np.abs(a[finite]), initial=0.0)
    return bool(np.max(np.abs(a[finite] - b[finite]), initial=0.0) <= tolerance * scale)
