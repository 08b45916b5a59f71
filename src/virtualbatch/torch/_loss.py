"""The loss of a window: what a loss function may return, and the mean over all micro-batches."""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch

from virtualbatch.terms import SINGLE, loss_terms


def checked_terms(loss: Any) -> dict[Any, torch.Tensor]:
    """The terms of what a loss function returned for one micro-batch.

    Args:
        loss: a scalar, or a mapping of term names to scalars.

    Returns:
        Term name -> scalar tensor of a floating dtype.

    Raises:
        TypeError: a term is not a scalar tensor of a floating dtype.
        ValueError: a term has a shape, or the mapping is empty.
    """
    # Nearly every loss is this, and a small micro-batch takes no longer than a few checks.
    if isinstance(loss, torch.Tensor) and loss.dim() == 0 and loss.is_floating_point():
        return {SINGLE: loss}
    terms = loss_terms(loss)
    for term in terms.values():
        if not isinstance(term, torch.Tensor):
            raise TypeError(
                f"A loss must be a tensor of PyTorch. Got {type(term).__name__}. "
                "Compute it with PyTorch operations, or it has no gradient."
            )
        if not term.is_floating_point():
            raise TypeError(
                "A loss must have a floating dtype. "
                f"Got {str(term.dtype).removeprefix('torch.')}. "
                "Cast what it is computed from to a float."
            )
    return terms


class WindowLoss:
    """The losses of a window's micro-batches, summed in float32 or wider when all are there."""

    def __init__(self) -> None:
        self._terms: list[torch.Tensor] = []
        self._shares: list[float] = []

    def add(self, terms: Iterable[torch.Tensor], shares: Iterable[float]) -> None:
        """Adds one micro-batch.

        Args:
            terms: scalar losses.
            shares: one number per term. A term of share 0 is left out, because it may be NaN, and
                0 times NaN is NaN.
        """
        for term in terms:
            self._terms.append(term.detach())
        self._shares += shares

    def mean(self) -> torch.Tensor:
        """The loss of the whole batch; a detached scalar of the terms' common dtype."""
        dtype = reduce(torch.promote_types, {term.dtype for term in self._terms})
        wide = torch.promote_types(dtype, torch.float32)
        # Most shares of a window are equal: few operations then take all terms together.
        groups: dict[tuple[float, torch.device], list[torch.Tensor]] = {}
        for term, share in zip(self._terms, self._shares, strict=True):
            if share:
                groups.setdefault((share, term.device), []).append(term)
        total: torch.Tensor | None = None
        for (share, _), terms in groups.items():
            found = terms[0] if len(terms) == 1 else torch.stack(terms).to(wide).sum()
            if total is None:
                total = found.to(wide) * share
            else:
                total.add_(found, alpha=share)
        if total is None:
            raise ValueError("internal: a window has no loss with a share.")
        return total.to(dtype)
