"""A gradient that is added to what `.grad` holds, whatever the dtype and layout of either."""

import torch

from virtualbatch.window.shares import accumulator_dtype


def widened(x: torch.Tensor) -> torch.Tensor:
    """The same in the dtype in which gradients are summed."""
    return x.to(getattr(torch, accumulator_dtype(str(x.dtype).removeprefix("torch."))))


def added(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of two gradients, dense or sparse."""
    # PyTorch adds sparse to dense, but not dense to sparse.
    return b + a if a.is_sparse and not b.is_sparse else a + b


def committed(
    parameter: torch.Tensor, before: torch.Tensor | None, found: torch.Tensor | None
) -> torch.Tensor | None:
    """What `.grad` of a parameter becomes after a window.

    Args:
        parameter: the parameter.
        before: what `.grad` held before; changed in place where it can take the sum.
        found: the gradient of the window, which may be changed; None for none.
    """
    if found is None:
        return before
    if before is None:
        # Many entries of one sparse row would be added in few bits by whoever reads them.
        if found.is_sparse and found.dtype != parameter.dtype:
            found = found.coalesce()
        return found.to(parameter.dtype)
    if before.is_sparse != found.is_sparse and before.is_sparse:
        return added(before, found).to(before.dtype)
    if before.dtype == found.dtype:
        return before.add_(found)
    if not found.is_sparse and torch.promote_types(before.dtype, found.dtype) == found.dtype:
        return before.copy_(found.add_(before))
    total = added(widened(before), found)
    if not total.is_sparse:
        return before.copy_(total)
    return total.coalesce().to(before.dtype)
