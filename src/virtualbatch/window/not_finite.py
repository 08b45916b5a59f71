"""Logs which micro-batch has a loss that is not finite."""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from virtualbatch.window.terms import SINGLE
from virtualbatch.window.window import Window

_log = logging.getLogger("virtualbatch")

Entry = TypeVar("Entry")

_FIX = "See docs/guides/not_finite.md."


class LossWatch:
    """Logs which micro-batch of a window has a loss that is not finite.

    It logs once, and again only after a window with a finite loss, because parameters that are NaN
    make every later loss NaN too.
    """

    def __init__(self) -> None:
        self._windows = 0
        self._loss = 0.0
        self._said = False

    def listens(self, loss: float) -> bool:
        """Takes the loss of a window. Returns whether `hear` needs its micro-batches' losses.

        Args:
            loss: the loss of the whole window.
        """
        self._windows, self._loss = self._windows + 1, loss
        if math.isfinite(loss):
            self._said = False
        return not math.isfinite(loss) and not self._said

    def hear(
        self,
        losses: Sequence[Mapping[Any, float]],
        rows: Sequence[int | None],
        what: str | None = None,
    ) -> None:
        """Logs the micro-batches of a window whose loss is not finite.

        Args:
            losses: for each micro-batch, in order, the terms of its loss that count, by name.
            rows: the rows of each micro-batch, in the order of the batch; None if unknown.
            what: the name of the numbers, if they are not losses; else None. If all numbers are
                finite and have a name, only the window is logged.
        """
        bad = [
            (index, name, value)
            for index, terms in enumerate(losses)
            for name, value in terms.items()
            if not math.isfinite(value)
        ]
        if not bad:
            # The sum of finite losses can overflow.
            if what is None:
                return
            what, losses, rows, bad = None, [{}], [None], [(0, SINGLE, self._loss)]
        self._said = True
        index, name, value = bad[0]
        subject = what or ("The loss" if name == SINGLE else f"Term {name!r} of the loss")
        count = len(losses)
        found = len({index for index, _, _ in bad})
        if found == count > 1:
            _log.warning(
                "%s is not finite in each of %d micro-batches of window %d: parameters, weights "
                "or all rows may not be finite already. %s",
                *(subject, count, self._windows, _FIX),
            )
            return
        _log.warning(
            "%s is %s in %swindow %d%s%s, so its update cannot be trusted. Look at its rows, and "
            "leave the update out. %s",
            *(subject, "not finite" if what else value),
            "" if count == 1 else f"micro-batch {index + 1} of {count} of ",
            *(self._windows, _place(rows, index)),
            *("" if found == 1 else f", the first of {found} such", _FIX),
        )


def rows_in_order(batch: Any, rows: Sequence[int | None]) -> Sequence[int | None]:
    """Rows of each micro-batch for `LossWatch`; all None if the rows were sorted.

    Args:
        batch: the batch as the user passed it.
        rows: the rows of each micro-batch.
    """
    return [None] * len(rows) if isinstance(batch, Window) and batch.sorted_rows else rows


def _place(rows: Sequence[int | None], index: int) -> str:
    before, here = rows[:index], rows[index]
    if None in before or here is None:
        return ""
    start = sum(n for n in before if n is not None)
    return f" (rows {start} to {start + here - 1} of its batch)"


class LateLosses(Generic[Entry]):
    """Losses of windows that a device may not have computed yet, handled without waiting.

    Args:
        is_there: (entry, whether it belongs to the latest window) -> whether it can be handled now.
        hear: handles an entry. It is called in the order of windows.
    """

    def __init__(self, is_there: Callable[[Entry, bool], bool], hear: Callable[[Entry], None]):
        self._is_there = is_there
        self._hear = hear
        self._waiting: deque[Entry] = deque()

    def take(self, entry: Entry) -> None:
        """Takes the losses of a window, and handles all that are available."""
        self._waiting.append(entry)
        while self._waiting and self._is_there(self._waiting[0], len(self._waiting) == 1):
            self._hear(self._waiting.popleft())

    def hear_all(self) -> None:
        """Handles all windows, and waits for their losses if necessary."""
        while self._waiting:
            self._hear(self._waiting.popleft())
