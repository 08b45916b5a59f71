"""Finds the micro-batches of `fit` whose losses are not finite.

A compiled window reports its losses in the logs of its step. They are read while a later window
runs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from virtualbatch.window.not_finite import LateLosses, LossWatch
from virtualbatch.window.terms import SINGLE

# The key under which the logs of a step hold losses. PyTorch stores a `Heard` there. TensorFlow and
# JAX store one of three forms:
# - A table with one line per micro-batch: its part of the loss, and its rows.
# - If a loss sees all rows: (that loss, a table with one line per micro-batch). A line holds 0 if
#   all predictions of the micro-batch are finite, else NaN; and the rows.
# - On replicas: a table with one line per replica: its loss, its number of micro-batches, and the
#   number of the first micro-batch that is not finite, counted from 1, or 0.
LOSSES = "virtualbatch_losses"
# What is reported as not finite for a micro-batch whose loss sees all rows.
PREDICTIONS = "The prediction of the model"
# Stand in the place of the rows. NO_PLACE: the rows are not the next ones of the batch.
# NOTHING_KNOWN: the loss cannot be separated from the losses before it.
NO_PLACE, NOTHING_KNOWN = -1, -2
# The number of columns in the table of replicas.
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
        """The logs of a step as Keras expects them. Losses are taken out and read now or later.

        Args:
            logs: the logs of a step; perhaps with the losses of one window, or a list with the
                losses of several windows.
        """
        found = logs.pop(LOSSES, [])
        for entry in found if isinstance(found, list) else [found]:
            self._late.take(entry)
        return logs

    def hear_all(self) -> None:
        """Reads all losses that were received, and waits for those that are not ready."""
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
        # The numbers are parts of the loss. With `whole` they only say which predictions are bad.
        if not self._watch.listens(sum(numbers) if whole is None else float(whole)):
            return
        places = [None if n == NO_PLACE else int(n) for n in rows]
        parts = [{SINGLE: x} for x in numbers]
        self._watch.hear(parts, places, None if whole is None else PREDICTIONS)


def without_losses(logs: dict[str, Any]) -> dict[str, Any]:
    """The logs of a step without the losses of micro-batches."""
    logs.pop(LOSSES, None)
    return logs
