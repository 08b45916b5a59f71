"""Statistics of a window's gradient noise, measured by hooks as each gradient passes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._unhook import unhook

_HALF = (torch.float16, torch.bfloat16)
# Norms that are added up at once: each call costs more than the numbers that it adds.
_MOST_WAITING = 1024


class GradientNorms:
    """Squared norms of the gradients of a window's micro-batches; no gradient is kept.

    Args:
        parameters: trainable parameters, each once.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self._parameters = parameters
        # Norms of the latest micro-batch; of those before, each with what its square counts.
        self._of_one: list[torch.Tensor] = []
        self._waiting: list[torch.Tensor] = []
        self._factors: list[float] = []
        self._total: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While gradients of the parameters are seen."""
        see = self._see

        def leave() -> None:
            for parameter in self._parameters:
                unhook(see, parameter._backward_hooks)

        with Undo(leave):
            for parameter in self._parameters:
                parameter.register_hook(see)
            yield

    def hear_scale(self, loss: torch.Tensor) -> None:
        """Sees what a backward pass starts from, if that is not 1: the scale of a `GradScaler`."""

        def start(gradient: torch.Tensor) -> None:
            handle.remove()
            self._scale = gradient.detach().clone()

        handle = loss.register_hook(start)

    def close(self, share: float, factor: float) -> None:
        """Ends a micro-batch.

        Args:
            share: its share of the window, above 0.
            factor: what the gradients that passed lack of their share.
        """
        self._waiting += self._of_one
        self._factors += [factor**2 / share] * len(self._of_one)
        self._of_one = []
        if len(self._waiting) >= _MOST_WAITING:
            self._add_up()

    def stats(self, gradients: Iterable[torch.Tensor], rows: Any, microbatches: int) -> WindowStats:
        """The statistics of a window.

        Args:
            gradients: sums of the window.
            rows: rows of the window.
            microbatches: micro-batches that count for something.
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
            gradients: sums of the window.
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
        # Entries of one row are added up before they are squared.
        gradient = gradient.coalesce().values()
    if gradient.dtype in _HALF:
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return torch.linalg.vector_norm(gradient)


def _weighted_squares(norms: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """Sum of factors times squared norms, on the device of the first; 0 of none."""
    if not norms:
        return torch.zeros(())
    first = norms[0].device
    together = torch.stack([x if x.device == first else x.to(first) for x in norms]).detach()
    # From pinned memory the copy does not make the host wait.
    host = torch.tensor(factors, dtype=together.dtype, pin_memory=together.is_cuda)
    return (together.square() * host.to(together.device, non_blocking=True)).sum()
