"""The loss of a window: checks of what a loss function returns, and the mean of all rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from virtualbatch.window.terms import SINGLE, loss_terms


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
    # Nearly every loss is one scalar, and a small micro-batch takes no longer than a few checks.
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
    """The losses of a window's micro-batches, summed in float32 or wider.

    Attributes:
        dtype: the common dtype of the terms; None before the first term.
        total: the sum of the losses, a detached scalar; None if no term has a share.
        parts: (number of the micro-batch, name of the term, its loss), for all terms with a share.
        rows: the rows of each micro-batch; None where they are not known.
    """

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self._wide = torch.float32
        self.total: torch.Tensor | None = None
        self.parts: list[tuple[int, Any, torch.Tensor]] = []
        self.rows: Sequence[int | None] = []

    def add(self, index: int, terms: Mapping[Any, torch.Tensor], shares: Iterable[float]) -> None:
        """Adds one micro-batch.

        Args:
            index: the number of the micro-batch.
            terms: scalar losses.
            shares: one number per term. A term of share 0 is left out, because it may be NaN, and
                0 times NaN is NaN.
        """
        for (name, term), share in zip(terms.items(), shares, strict=True):
            if term.dtype is not self.dtype:
                self._promote(term.dtype)
            if not share:
                continue
            loss = term.detach()
            # A view would keep the memory of its base.
            self.parts.append((index, name, loss.clone() if term._is_view() else loss))
            if self.total is None:
                self.total = loss.to(self._wide) * share
            else:
                self.total.add_(loss, alpha=share)

    def zero(self) -> None:
        """Makes the total so far zero, NaN included."""
        if self.total is not None:
            self.total = torch.zeros_like(self.total)

    def mean(self) -> torch.Tensor:
        """The loss of the whole batch, a detached scalar of the terms' common dtype."""
        if self.total is None or self.dtype is None:
            raise ValueError("internal: no term of a window has a share.")
        return self.total.to(self.dtype)

    def _promote(self, dtype: torch.dtype) -> None:
        known = self.dtype
        self.dtype = dtype if known is None else torch.promote_types(known, dtype)
        self._wide = torch.promote_types(self.dtype, torch.float32)
        if self.total is not None:
            self.total = self.total.to(self._wide)
