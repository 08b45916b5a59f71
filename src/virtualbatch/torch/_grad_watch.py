"""Checks that a loss function changes neither `.grad` nor the recording of gradients.

`.grad` holds the sums of earlier micro-batches, and later micro-batches must be recorded.
"""

from collections.abc import Sequence
from operator import is_

import torch

from virtualbatch.torch._faults import StatefulLossError

# Getters that `map` calls: a loop in Python would take too long where micro-batches are small.
_GRAD = torch.Tensor.grad.__get__
_VERSION = torch.Tensor._version.__get__


class GradWatch:
    """The `.grad`s of parameters as the engine left them.

    Args:
        parameters: tensors that take a gradient, each once.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self._parameters = parameters
        self._grads: list[torch.Tensor | None] = []
        self._held: list[torch.Tensor] = []
        self._version = 0

    def look(self) -> None:
        """Remembers the `.grad`s of the parameters as they are now."""
        self._grads = grads = list(map(_GRAD, self._parameters))
        self._held = [grad for grad in grads if grad is not None]
        self._version = sum(map(_VERSION, self._held))

    def check(self) -> None:
        """Refuses a loss function that changed a `.grad` since the last `look`.

        Raises:
            StatefulLossError: a `.grad` is another object, or was written.
        """
        # Versions only grow, so their sum shows whether one of them grew.
        if (
            all(map(is_, map(_GRAD, self._parameters), self._grads))
            and sum(map(_VERSION, self._held)) == self._version
        ):
            return
        raise StatefulLossError(
            "A loss function must leave .grad alone: it holds the sums of earlier micro-batches.",
            "zero_grad() or backward() inside loss_fn, which changed it",
            "Take inner gradients by torch.autograd.grad(...), and call zero_grad() outside.",
        )


def check_recording(before: bool) -> None:
    """Refuses a function that switched the recording of gradients.

    Args:
        before: whether gradients were recorded when the function was called.

    Raises:
        StatefulLossError: the recording is now the other way.
    """
    if torch.is_grad_enabled() is before:
        return
    now = not before
    raise StatefulLossError(
        "A loss function must not leave gradient recording switched on or off for later "
        "micro-batches.",
        f"torch.set_grad_enabled({now}) inside loss_fn, which was not undone",
        f'Use the block "with torch.set_grad_enabled({now}):" around the lines that need it.',
    )
