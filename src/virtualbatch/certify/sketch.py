"""Summarises a large value in few numbers that still show which of its rows differ.

Rows may be on any axis, and only a comparison with another run shows the axis. So along every axis,
each entry is projected onto a few fixed random directions. Equal entries have equal projections,
and different entries have different ones.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

# Directions; it is practically impossible that different values agree in all of them.
_DIRECTIONS = 4
# Directions repeat after this many numbers. It is a prime, so they do not repeat with an axis.
_PERIOD = 65521
# Longer axes are not projected, because their sketch would not be small.
_LONGEST = 2**14
# Numbers that are copied at a time.
_BLOCK = 2**22


class Entries(NamedTuple):
    """The summary of the entries along one axis.

    Fields:
        projections: shape (entries, directions); NaN and infinity count as 0.
        not_finite: number of NaN, infinity and minus infinity in each entry; shape (entries, 3).
    """

    projections: np.ndarray
    not_finite: np.ndarray


class Sketch(NamedTuple):
    """The summary of a value.

    Fields:
        shape: the shape of the value.
        axes: the entries of each axis; None for an axis with too many entries.
        broken: whether there is any NaN or infinity; minus infinity does not count.
    """

    shape: tuple[int, ...]
    axes: tuple[Entries | None, ...]
    broken: bool


def sketched(value: np.ndarray | Sketch) -> Sketch:
    """The sketch of a value; a sketch is returned as it is."""
    if isinstance(value, Sketch):
        return value
    finite = np.isfinite(value)
    kinds: list[np.ndarray] = []
    if not finite.all():
        kinds = [np.isnan(value), np.isposinf(value), np.isneginf(value)]
        value = np.where(finite, value, 0.0)
    axes = tuple(
        Entries(_projected(value, axis), _counted(kinds, value.ndim, axis, length))
        if length <= _LONGEST
        else None
        for axis, length in enumerate(value.shape)
    )
    return Sketch(value.shape, axes, any(kind.any() for kind in kinds[:2]))


def _projected(value: np.ndarray, axis: int) -> np.ndarray:
    entries = np.moveaxis(value, axis, 0)
    length = len(entries)
    each = value.size // max(length, 1)
    block = max(1, _BLOCK // max(each, 1))
    projections = np.zeros((length, _DIRECTIONS))
    for first in range(0, length, block):
        some = entries[first : first + block].reshape(-1, each)
        for start in range(0, each, _PERIOD):
            part = some[:, start : start + _PERIOD]
            projections[first : first + block] += part @ _directions()[: part.shape[1]]
    return projections


def _counted(kinds: list[np.ndarray], axes: int, axis: int, length: int) -> np.ndarray:
    if not kinds:
        return np.zeros((length, 3), int)
    others = tuple(other for other in range(axes) if other != axis)
    return np.stack([kind.sum(others) for kind in kinds], -1)


@cache
def _directions() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((_PERIOD, _DIRECTIONS))
