"""Statistics of a window's gradient noise. Hooks measure each gradient in the backward pass."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._unhook import unhook

_HALF = (torch.float16, torch.bfloat16)
# Norms that are added up in one call, because a call costs more than the numbers that it adds.
_MOST_WAITING = 1024


class GradientNorms:
    """Squared norms of the gradients of a window's micro-batches; no gradient is kept.

    Args:
        parameters: trainable parameters, each once.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self._parameters = parameters
        # `_of_one` has the norms of the latest micro-batch. `_waiting` has the norms of earlier
        # ones, and `_factors` the factors of their squares.
        self._of_one: list[torch.Tensor] = []
        self._waiting: list[torch.Tensor] = []
        self._factors: list[float] = []
        self._total: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context in which hooks see the gradients of the parameters."""
        see = self._see

        def leave() -> None:
            for parameter in self._parameters:
                unhook(see, parameter._backward_hooks)

        with Undo(leave):
            for parameter in self._parameters:
                parameter.register_hook(see)
            yield

    def hear_scale(self, loss: torch.Tensor) -> None:
        """Notes the gradient that a backward pass starts from, such as a `GradScaler`'s scale."""

        def start(gradient: torch.Tensor) -> None:
            handle.remove()
            self._scale = gradient.detach().clone()

        handle = loss.register_hook(start)

    def close(self, share: float, factor: float) -> None:
        """Ends a micro-batch.

        Args:
            share: the share of the micro-batch in the window, above 0.
            factor: the factor between the seen gradients and their share of the window's gradient.
        """
        self._waiting += self._of_one
        self._factors += [factor**2 / share] * len(self._of_one)
        self._of_one = []
        if len(self._waiting) >= _MOST_WAITING:
            self._add_up()

    def stats(self, gradients: Iterable[torch.Tensor], rows: Any, microbatches: int) -> WindowStats:
        """The statistics of a window.

        Args:
            gradients: the summed gradients of the window.
            rows: the rows of the window.
            microbatches: the number of micro-batches with a share above 0.
        """
        square = self.square(gradients)
        return WindowStats(rows, microbatches, self.mean_square().to(square.device), square)

    def mean_square(self) -> torch.Tensor:
        """Mean square of the gradients of the micro-batches that were closed; a scalar."""
        self._add_up()
        found = torch.zeros(()) if self._total is None else self._total
        return found if self._scale is None else found * self._scale.to(found) ** -2

    def square(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """Squared norm of the gradient of the window; a scalar.

        Args:
            gradients: the summed gradients of the window.
        """
        norms = [_norm(gradient) for gradient in gradients]
        found = _weighted_squares(norms, [1.0] * len(norms))
        return found if self._scale is None else found * self._scale.to(found) ** -2

    def _see(self, gradient: torch.Tensor) -> None:
        self._of_one.append(_norm(gradient))

    def _add_up(self) -> None:
        if self._waiting:
            found = _weighted_squares(self._waiting, self._factors)
            self._total = found if self._total is None else self._total + found
            self._waiting, self._factors = [], []


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.is_sparse:
        # Entries of one row must be added up before they are squared.
        gradient = gradient.coalesce().values()
    if gradient.dtype in _HALF:
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return torch.linalg.vector_norm(gradient)


def _weighted_squares(norms: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """Sum of factors times squared norms, on the device of the first norm; 0 without norms."""
    if not norms:
        return torch.zeros(())
    first = norms[0].device
    together = torch.stack([x if x.device == first else x.to(first) for x in norms]).detach()
    # From pinned memory the copy does not make the host wait.
    host = torch.tensor(factors, dtype=together.dtype, pin_memory=together.is_cuda)
    return (together.square() * host.to(together.device, non_blocking=True)).sum()
