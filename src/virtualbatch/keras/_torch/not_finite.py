"""Finds the micro-batches of `fit` whose losses are not finite, on PyTorch."""

from collections.abc import Sequence
from typing import Any

import keras
import torch

from virtualbatch.keras._not_finite import LOSSES
from virtualbatch.torch._not_finite import Heard, ModuleLosses
from virtualbatch.window.terms import SINGLE


class LossesOfFit(ModuleLosses):
    """Receives the losses of a model's windows."""

    def told(self, logs: dict[str, Any]) -> dict[str, Any]:
        """The logs of a step as Keras expects them. Losses are taken out and received."""
        found = logs.pop(LOSSES, None)
        if found is not None:
            self.take(found)
        return logs


def heard(
    total: torch.Tensor,
    parts: Sequence[torch.Tensor],
    rows: Sequence[int | None],
    what: str | None = None,
) -> Heard:
    """The entry for losses in the logs of a window; see `Heard`.

    Args:
        total: the loss of the window.
        parts: one scalar for each micro-batch.
        rows: the rows of each micro-batch, or None.
        what: what the parts are, in words, if they are not parts of the loss.
    """
    found = [(index, SINGLE, part) for index, part in enumerate(parts)]
    return Heard(total.detach(), found, rows, what)


class OfOne:
    """The loss of Keras' own step, read from the loss tracker.

    Args:
        model: the model, before the step.
    """

    def __init__(self, model: keras.Model):
        self._tracker = model._loss_tracker
        self._before = self._tracker.total.value.detach().clone()

    def heard(self, rows: int) -> Heard:
        """The entry for losses in the logs, after the step.

        Args:
            rows: rows of the batch.
        """
        loss = self._tracker.total.value.detach() - self._before
        return Heard(loss, [(0, SINGLE, loss)], [rows], before=self._before)
