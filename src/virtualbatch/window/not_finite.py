"""Naming the micro-batch whose loss is not finite."""

import logging
import math
from collections.abc import Sequence

_log = logging.getLogger("virtualbatch")


class LossWatch:
    """Logs which micro-batch of a window has a loss that is not finite.

    It does so once, and again only after a window whose losses were finite: weights that are NaN
    make every later loss NaN too.
    """

    def __init__(self) -> None:
        self._said = False

    @property
    def said(self) -> bool:
        """Whether the latest window was told of, so that the next need not be looked at closely."""
        return self._said

    def finite(self) -> None:
        """Hears of a window whose loss is finite."""
        self._said = False

    def hear(self, losses: Sequence[float], rows: Sequence[int | None]) -> None:
        """Hears of the losses of a window's micro-batches.

        Args:
            losses: one for each micro-batch that counts, in order; NaN or infinite ones are named.
                What counts for nothing is given as 0.
            rows: of each micro-batch; None where they are not known.
        """
        found = [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
        if not found:
            self.finite()
            return
        if self._said:
            return
        self._said = True
        first = found[0]
        _log.warning(
            "The loss of micro-batch %d of %d is %s%s%s, so loss and gradients of this update are "
            "not finite. Look at these rows, and do not apply the update. See docs/not_finite.md.",
            first + 1,
            len(losses),
            losses[first],
            _place(rows, first),
            "" if len(found) == 1 else f", the first of {len(found)}",
        )


def _place(rows: Sequence[int | None], index: int) -> str:
    known = [n for n in rows[: index + 1] if n is not None]
    if len(known) <= index:
        return ""
    start = sum(known[:-1])
    return f" (rows {start} to {start + known[-1] - 1} of the batch)"
