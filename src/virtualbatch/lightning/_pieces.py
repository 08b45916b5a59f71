"""The weight of a micro-batch when values of micro-batches are combined."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from virtualbatch.window.terms import SUM


class Piece(NamedTuple):
    """One micro-batch that has run.

    Fields:
        rows: its rows; None if they are not known.
        weight: see `accumulate`.
        microbatch: the micro-batch that the training step got.
        loss: its loss, detached.
    """

    rows: int | None
    weight: Any
    microbatch: Any
    loss: torch.Tensor


class Counts(NamedTuple):
    """The weights of a micro-batch that has run. Its data is not kept, to save memory.

    Fields:
        by_rows: its weight in a mean over rows.
        by_weight: its weight in the loss; None if the loss is a sum.
        loss: see `Piece`.
    """

    by_rows: Any
    by_weight: Any
    loss: torch.Tensor


def counts(piece: Piece) -> Counts:
    """The weights of a micro-batch. If its rows are unknown, `by_rows` is its weight, or 1."""
    rows = piece.rows
    if piece.weight is None or piece.weight == SUM:
        by_rows = 1 if rows is None else rows
        return Counts(by_rows, None if piece.weight == SUM else by_rows, piece.loss)
    with torch.no_grad():
        by_weight = piece.weight(piece.microbatch)
    return Counts(by_weight if rows is None else rows, by_weight, piece.loss)


def mean(values: Sequence[Any], weights: Sequence[Any], like: torch.Tensor) -> torch.Tensor:
    """The weighted mean of some values, without waiting for the device that they are on.

    Args:
        values: numbers, or tensors of one shape. A value of weight 0 may be NaN.
        weights: numbers or scalars.
        like: a tensor on the device of the result.
    """
    stacked, weighing = together(values, like), together(weights, like)
    weighing = weighing.reshape(-1, *[1] * (stacked.dim() - 1))
    products = torch.where(weighing > 0, stacked * weighing, torch.zeros_like(stacked))
    total = weighing.sum()
    return products.sum(0) / torch.where(total > 0, total, torch.ones_like(total))


def together(values: Sequence[Any], like: torch.Tensor) -> torch.Tensor:
    """Values as one tensor, in float64 if the device has it.

    Args:
        values: see `mean`.
        like: see `mean`.
    """
    # Apple's GPUs have no float64: https://github.com/pytorch/pytorch/issues/122602
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    if not any(isinstance(value, torch.Tensor) for value in values):
        return torch.tensor([float(value) for value in values], dtype=wide, device=like.device)
    return torch.stack([torch.as_tensor(x).detach().to(like.device, wide) for x in values])
