"""Moments of BatchNorm layers as sums that ranks add up, and sums as moments.

Subtracting the squared mean from the mean square cancels digits. The sums are float64, so the loss
is smaller than the rounding errors of float32 inputs.
"""

from collections.abc import Iterator, Sequence

import torch

from virtualbatch.torch._batchnorm import Moments


def as_sums(
    merged: Sequence[Sequence[Moments]], calls: Sequence[int], channels: Sequence[int]
) -> list[torch.Tensor]:
    """For each call of each layer: the number of values per channel, their sums, their squares.

    Args:
        merged: for each layer the moments of its calls on this rank.
        calls: for each layer the number of calls on the rank with the most calls.
        channels: the channels of each layer.

    Returns:
        Vectors of float64, with zeros for calls that this rank did not make.
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
        sums: the vectors of `as_sums`, joined and added up over ranks.
        calls: as in `as_sums`.
        channels: as in `as_sums`.
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
