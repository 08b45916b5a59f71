"""The time of a row and of an update, from a plan that has timed several micro-batch sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class TimedPlan(Protocol):
    """The attributes of `virtualbatch.Plan` that are read here."""

    @property
    def microbatch_size(self) -> int:
        """Rows of the micro-batch that was chosen."""

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of the planned batch."""

    @property
    def rows(self) -> Sequence[Any]:
        """Entries with `microbatch_size` and `seconds_per_batch`."""


class Times(NamedTuple):
    """The times that a plan shows.

    Fields:
        seconds_per_row: the time of a row in micro-batches of the chosen size.
        seconds_per_update: the least time that a window takes beside its rows.
    """

    seconds_per_row: float
    seconds_per_update: float


def times_of(plan: TimedPlan, rows: float) -> Times:
    """Reads the times from a plan.

    A micro-batch of m rows takes a + m t, and the batch takes the sum over its micro-batches. The
    line through the timed sizes gives a. Every update takes at least a once.

    Args:
        plan: the plan of the batch.
        rows: rows of the batch.

    Raises:
        TypeError: `plan` is not a plan.
        ValueError: it is the plan of another batch, or it timed fewer than two sizes.
    """
    if not all(hasattr(plan, name) for name in ("microbatch_size", "accumulation_steps", "rows")):
        raise TypeError(
            "plan must be what a plan function returned. "
            f"Got plan={plan!r}. Or pass seconds_per_row and seconds_per_update."
        )
    size = plan.microbatch_size
    if -(-int(rows) // size) != plan.accumulation_steps:
        raise ValueError(
            "A plan must be that of the batch that the noise was seen in. "
            f"Got one of {plan.accumulation_steps} micro-batches of {size} rows, for {rows:.0f} "
            "rows. Plan for that batch, or pass seconds_per_row and seconds_per_update."
        )
    timed = [row for row in plan.rows if row.seconds_per_batch is not None]
    if len(timed) < 2:
        raise ValueError(
            "A plan must have timed two sizes or more. "
            f"Got {len(timed)}. Pass seconds_per_row and seconds_per_update: "
            "see docs/guides/noise_scale.md."
        )
    steps = np.array([-(-int(rows) // row.microbatch_size) for row in timed])
    seconds = np.array([row.seconds_per_batch for row in timed])
    # Seconds of the batch are rows * t + steps * a. Divide by the seconds, because relative errors
    # are alike.
    table = np.stack([np.full(len(timed), rows), steps], 1) / seconds[:, None]
    _, each = np.linalg.lstsq(table, np.ones(len(timed)), rcond=None)[0]
    chosen = min(timed, key=lambda row: abs(row.microbatch_size - size))
    per_row = chosen.seconds_per_batch / rows
    # Noise may make the line fall. Then take the time of a row, the smallest time that can be seen.
    return Times(float(per_row), float(max(each, per_row)))
