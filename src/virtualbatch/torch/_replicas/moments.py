"""Moments of BatchNorm layers as sums that ranks add up, and back again.

Subtracting the squared mean from the mean square cancels digits. The sums are float64, so this
costs less than inputs of float32 have lost by their own rounding.
"""

from collections.abc import Iterator, Sequence

import torch

from virtualbatch.torch._batchnorm import Moments


def as_sums(
    merged: Sequence[Sequence[Moments]], calls: Sequence[int], channels: Sequence[int]
) -> list[torch.Tensor]:
    """For each call of each layer the values per channel, their sums and sums of squares.

    Args:
        merged: for each layer the moments of its calls on this rank.
        calls: for each layer its calls on the rank that has most.
        channels: of each layer.

    Returns:
        Vectors of float64, zeros for calls that this rank lacks.
    """
    found = []
    for of_layer, count, width in zip(merged, calls, channels, strict=True):
        for moments in of_layer:
            mean, variance = moments.mean.double(), moments.variance.double()
            squares = (moments.values - 1) * variance + moments.values * mean**2
            values = torch.full((1,), float(moments.values), dtype=mean.dtype, device=mean.device)
            found.append(torch.cat([values, moments.values * mean, squares]))
        lacking = (count - len(of_layer)) * (1 + 2 * width)
        found.append(torch.zeros(lacking, dtype=torch.float64))
    return found


def from_sums(
    sums: torch.Tensor, calls: Sequence[int], channels: Sequence[int]
) -> list[list[Moments]]:
    """The moments of all ranks, for each call of each layer.

    Args:
        sums: what `as_sums` gave, added up over ranks.
        calls: see there.
        channels: see there.
    """
    pieces = iter(
        sums.split([1 + 2 * n for n, c in zip(channels, calls, strict=True) for _ in range(c)])
    )
    return [list(_moments(pieces, count)) for count in calls]


def _moments(pieces: Iterator[torch.Tensor], count: int) -> Iterator[Moments]:
    for _ in range(count):
        piece = next(pieces)
        values = round(float(piece[0]))
        total, squares = piece[1:].chunk(2)
        mean = total / values
        yield Moments(values, mean, (squares - total * mean) / (values - 1))
