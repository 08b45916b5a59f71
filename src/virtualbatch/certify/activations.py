"""Finds where rows are coupled: compares the activations of a run and of runs on its parts.

A value that is computed row by row does not depend on the rows that run with it. The first
activation that does depend on them shows where rows are coupled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virtualbatch.certify.sketch import Sketch, sketched

# The limit for one run. Three runs are compared at a time. Beyond it, activations are sketched.
_KEPT_BYTES = 2**28


class Activation(NamedTuple):
    """One value that a run computed.

    Fields:
        where: the layer and the line, in words.
        layer: class of the innermost layer, or an empty text.
        value: the value, any shape, or its sketch.
    """

    where: str
    layer: str
    value: np.ndarray | Sketch


class Recording:
    """The activations of one run: complete up to a limit of memory, then as sketches.

    Attributes:
        activations: the activations, in the order of the run.
    """

    def __init__(self) -> None:
        self.activations: list[Activation] = []
        self._left = _KEPT_BYTES

    def add(self, where: str, layer: str, value: np.ndarray) -> None:
        """Adds an activation.

        Args:
            where: see `Activation`.
            layer: see `Activation`.
            value: in float64; it must not be changed later.
        """
        # A single number has no axis to sketch.
        fits = value.nbytes <= self._left or not value.ndim
        if fits:
            self._left -= value.nbytes
        self.activations.append(Activation(where, layer, value if fits else sketched(value)))


def first_difference(
    whole: Sequence[Activation], parts: Sequence[Sequence[Activation]], tolerance: float
) -> Activation | None:
    """The first activation of a run that differs, in some row, from the activations of its parts.

    Activations without an axis of rows are skipped, because a sum over rows may differ.

    Args:
        whole: activations of a run on all rows, in order.
        parts: activations of runs on consecutive groups of these rows.
        tolerance: the largest relative difference that counts as rounding.

    Returns:
        The activation of `whole`; None if all agree.
    """
    for index, activation in enumerate(whole):
        if any(index >= len(part) for part in parts):
            return activation
        pieces = [part[index].value for part in parts]
        if not _agree(activation.value, pieces, tolerance):
            return activation
    return None


def reduced_at(
    whole: Sequence[Activation], parts: Sequence[Sequence[Activation]]
) -> Activation | None:
    """The last activation without an axis of rows that comes right after one with such an axis.

    There, the loss is reduced to a number.

    Args:
        whole: activations of a run on all rows, in order.
        parts: activations of runs on consecutive groups of these rows.
    """
    last = None
    had_rows = False
    for index, activation in enumerate(whole):
        if any(index >= len(part) for part in parts):
            return last
        has_rows = activation.value.shape != parts[0][index].value.shape
        if had_rows and not has_rows:
            last = activation
        had_rows = has_rows
    return last


def first_not_finite(
    activations: Sequence[Activation], rows: int
) -> tuple[Activation, list[int]] | None:
    """The first activation that holds NaN or infinity, and the rows in which it does.

    Args:
        activations: the activations of a run, in order.
        rows: rows of the run.

    Returns:
        The activation and its rows (none if it has no axis of rows); None if all are finite.
    """
    for activation in activations:
        broken, entries = _not_finite(activation.value)
        if not broken:
            continue
        if entries is None or len(entries) % rows:
            return activation, []
        per_row = entries.reshape(rows, -1).any(axis=1)
        return activation, np.flatnonzero(per_row).tolist()
    return None


def same_values(first: Activation, second: Activation, tolerance: float) -> bool:
    """Whether two runs on the same rows computed the same value."""
    a, b = first.value, second.value
    if a.shape != b.shape:
        return False
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return _close(a, b, tolerance)
    return all(_sketches_agree(a, [b], axis, tolerance) for axis in range(len(a.shape)))


def _not_finite(value: np.ndarray | Sketch) -> tuple[bool, np.ndarray | None]:
    """Whether there is NaN or infinity, and which entries of the first axis are not finite."""
    if isinstance(value, Sketch):
        first = value.axes[0]
        return value.broken, None if first is None else np.any(first.not_finite, axis=1)
    bad = ~np.isfinite(value)
    # Masks of attention hold minus infinity on purpose.
    broken = bool(np.any(bad & ~np.isneginf(value)))
    entries = None if bad.ndim == 0 else np.any(bad.reshape(len(bad), -1), axis=1)
    return broken, entries


def _agree(
    whole: np.ndarray | Sketch, parts: Sequence[np.ndarray | Sketch], tolerance: float
) -> bool:
    if len(whole.shape) != len(parts[0].shape):
        return False
    axes = [
        axis
        for axis, length in enumerate(whole.shape)
        if any(part.shape[axis] != length for part in parts)
    ]
    if not axes:
        return True
    axis = axes[0]
    if len(axes) > 1 or sum(part.shape[axis] for part in parts) != whole.shape[axis]:
        return False
    arrays = [value for value in (whole, *parts) if isinstance(value, np.ndarray)]
    if len(arrays) == 1 + len(parts):
        return _joined_agree(arrays[0], arrays[1:], axis, tolerance)
    return _sketches_agree(whole, parts, axis, tolerance)


def _sketches_agree(
    whole: np.ndarray | Sketch, parts: Sequence[np.ndarray | Sketch], axis: int, tolerance: float
) -> bool:
    """Whether values agree along an axis, as far as their sketches show."""
    entries = [sketched(value).axes[axis] for value in (whole, *parts)]
    known = [each for each in entries if each is not None]
    if len(known) < len(entries):
        return True
    first, *rest = known
    return _joined_agree(
        first.projections, [each.projections for each in rest], 0, tolerance
    ) and _joined_agree(first.not_finite, [each.not_finite for each in rest], 0, 0.0)


def _joined_agree(whole: np.ndarray, parts: list[np.ndarray], axis: int, tolerance: float) -> bool:
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
