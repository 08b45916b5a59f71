"""The losses of micro-batches of `fit` that are not finite.

A compiled window reports them in the logs of its step, which are read once a later window runs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from virtualbatch.window.not_finite import LateLosses, LossWatch
from virtualbatch.window.terms import SINGLE

# Where the logs of a step tell of losses: in a table with a line for each micro-batch, its part of
# the loss and its rows. Where a loss sees all rows: that loss, and a table of NaN, or 0 where all
# that a micro-batch predicts is finite, and its rows. On replicas: a table with a line for each, of
# its loss, how many micro-batches it has, and the number of the first that is not finite, or 0.
LOSSES = "virtualbatch_losses"
# What is told of micro-batches whose loss sees all rows.
PREDICTIONS = "The prediction of the model"
# In the place of rows that are not the next ones of their batch; and where nothing is known of a
# loss, because it cannot be told from losses before it.
NO_PLACE, NOTHING_KNOWN = -1, -2
# Columns of what replicas tell.
_OF_REPLICAS = 3


class LossesOfFit:
    """Receives the losses of a model's windows.

    Args:
        is_there: see `LateLosses`.
    """

    def __init__(self, is_there: Callable[[Any, bool], bool]):
        self._watch = LossWatch()
        self._late: LateLosses[Any] = LateLosses(is_there, self._hear)

    def told(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Logs of a step as Keras knows them; the rest is processed now or later.

        Args:
            logs: of a step; perhaps with the losses of one window, or a list of them.
        """
        found = logs.pop(LOSSES, [])
        for entry in found if isinstance(found, list) else [found]:
            self._late.take(entry)
        return logs

    def hear_all(self) -> None:
        """Processes all that was received, and waits where it must."""
        self._late.hear_all()

    def _hear(self, entry: Any) -> None:
        whole, found = entry if isinstance(entry, tuple) else (None, entry)
        columns = np.asarray(found).T.tolist()
        if len(columns) == _OF_REPLICAS:
            self._hear_of_replicas(*columns)
        else:
            self._hear_of_microbatches(whole, *columns)

    def _hear_of_replicas(
        self, losses: list[float], counts: list[float], first: list[float]
    ) -> None:
        if self._watch.listens(sum(losses)) and any(first):
            number = next(k for k, index in enumerate(first) if index)
            of_microbatches = [{SINGLE: 0.0} for _ in range(int(counts[number]))]
            of_microbatches[int(first[number]) - 1][SINGLE] = losses[number]
            places = [None] * len(of_microbatches)
            self._watch.hear(of_microbatches, places, f"On replica {number} the loss")

    def _hear_of_microbatches(self, whole: Any, numbers: list[float], rows: list[float]) -> None:
        if NOTHING_KNOWN in rows:
            return
        # Each is a part of the whole, or tells of predictions whose loss sees all rows.
        if not self._watch.listens(sum(numbers) if whole is None else float(whole)):
            return
        places = [None if n == NO_PLACE else int(n) for n in rows]
        parts = [{SINGLE: x} for x in numbers]
        self._watch.hear(parts, places, None if whole is None else PREDICTIONS)


def without_losses(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs of a step without these losses."""
    logs.pop(LOSSES, None)
    return logs
