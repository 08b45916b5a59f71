"""Random numbers by row: a row gets the same numbers whichever rows run with it.

The numbers that a run on the whole batch draws are kept. Every other run gets the kept numbers of
its own rows. For that, the axis of rows in each draw must be known.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

Shape = Sequence[int]


class HostRandom:
    """The random generators of Python and NumPy, as they are now."""

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state(legacy=False)

    def has_moved(self) -> bool:
        """Whether random numbers were drawn since."""
        numpy: Any = np.random.get_state(legacy=False)
        before: Any = self._numpy
        return (
            random.getstate() != self._python
            or numpy["state"]["pos"] != before["state"]["pos"]
            or not np.array_equal(numpy["state"]["key"], before["state"]["key"])
        )

    def restore(self) -> None:
        """Sets the generators back to the kept state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def axes_of_rows(
    whole: Sequence[Shape], part: Sequence[Shape], rows: int, some: int
) -> list[int | None]:
    """The axis of rows in every draw, found by comparing two runs.

    Args:
        whole: shapes that a run on all rows draws, in order.
        part: shapes that a run on fewer rows draws, in order.
        rows: the number of all rows.
        some: the smaller number of rows.

    Returns:
        For each draw its axis of rows, or None if it has none.

    Raises:
        ValueError: random numbers do not belong to rows.
    """
    if len(whole) != len(part):
        raise ValueError(_refusal(f"{len(whole)} draws for {rows} rows and {len(part)} for {some}"))
    return [_axis(a, b, rows, some) for a, b in zip(whole, part, strict=True)]


def _axis(whole: Shape, part: Shape, rows: int, some: int) -> int | None:
    if len(whole) == len(part):
        axes = [k for k, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b]
        if not axes:
            return None
        each, rest = divmod(whole[axes[0]], rows)
        if len(axes) == 1 and not rest and part[axes[0]] == each * some:
            return axes[0]
    raise ValueError(_refusal(f"shape {tuple(whole)} for {rows} rows, {tuple(part)} for {some}"))


def _refusal(got: str) -> str:
    return (
        "certify keeps random numbers by row. "
        f"Got random numbers that do not belong to rows ({got}). "
        "Turn them off for the comparison."
    )
