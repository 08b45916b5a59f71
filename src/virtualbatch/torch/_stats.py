"""What a window's gradients show of their noise, seen by hooks as each gradient passes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from virtualbatch.noise import WindowStats


class GradientNorms:
    """Squared norms of the gradients of a window's micro-batches; no gradient is kept.

    Args:
        parameters: trainable parameters, each once.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self._parameters = parameters
        self._of_one: list[torch.Tensor] = []
        self._of_window: list[torch.Tensor] = []
        self._scale: torch.Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While gradients of the parameters are seen."""
        handles = [parameter.register_hook(self._see) for parameter in self._parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
        if self._of_one:
            self._of_window.append(_squared(self._of_one) * (factor**2 / share))
            self._of_one = []

    def stats(self, gradients: Iterable[torch.Tensor], rows: Any, microbatches: int) -> WindowStats:
        """The statistics of a window.

        Args:
            gradients: sums of the window.
            rows: rows of the window.
            microbatches: micro-batches that count for something.
        """
        square = _squared([_norm(gradient) for gradient in gradients])
        parts = [part.to(square.device) for part in self._of_window]
        mean_square = torch.stack(parts).sum() if parts else torch.zeros_like(square)
        if self._scale is not None:
            undo = self._scale.to(square) ** -2
            square, mean_square = square * undo, mean_square * undo
        return WindowStats(rows, microbatches, mean_square, square)

    def _see(self, gradient: torch.Tensor) -> None:
        self._of_one.append(_norm(gradient.detach()))


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.is_sparse:
        # Entries of one row are added up before they are squared.
        gradient = gradient.coalesce().values()
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dtype=wide)


def _squared(norms: Sequence[torch.Tensor]) -> Any:
    """Sum of the squares; 0 of none."""
    if not norms:
        return torch.zeros(())
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()
