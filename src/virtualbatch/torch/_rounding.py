"""Sums in bfloat16 with stochastic rounding, which has no bias.

The probability to round up is the remainder, as a part of the last digit. With rounding to nearest,
a sum stops growing when a term is less than half of its last digit. Compensated sums do not stop,
but need a second buffer, which costs as much as float32.
"""

from collections.abc import Iterator

import torch

# Numbers that are widened at once: 40 MiB for a short time, and few kernels per large parameter.
_BLOCK = 2**22


class StochasticRounding:
    """Adds gradients to sums in bfloat16.

    It has generators of its own, so no other generator moves. The same seed and the same gradients
    give the same sums.

    Args:
        seed: the seed of the random numbers.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def first(self, gradient: torch.Tensor, factor: float) -> torch.Tensor:
        """A new sum.

        Args:
            gradient: a dense gradient in bfloat16, of any shape.
            factor: what the gradient is multiplied by, in float32.
        """
        # Never in place, because a gradient may still belong to the graph.
        total = torch.empty_like(gradient)
        for kept, part in _blocks(total, gradient):
            kept.copy_(self._rounded(part.float().mul_(factor)))
        return total

    def add(self, total: torch.Tensor, gradient: torch.Tensor, factor: float) -> None:
        """Adds to a sum in place. The new sum is formed in float32 and rounded once.

        Args:
            total: a sum that `first` returned.
            gradient: a dense gradient in bfloat16, of the same shape.
            factor: what the gradient is multiplied by, in float32.
        """
        for kept, part in _blocks(total, gradient):
            kept.copy_(self._rounded(kept.float().add_(part, alpha=factor)))

    def _rounded(self, wide: torch.Tensor) -> torch.Tensor:
        """Rounds float32 numbers in place to bfloat16 numbers, which have only the upper 16 bits.

        Source:
            Zamirai, Zhang, Aberger, De Sa: Revisiting BFloat16 Training (2020).
        """
        is_nan = wide.isnan()
        # A random number is added below the last kept bit. Its carry rounds up, with the
        # probability of the remainder.
        drawn = self._bits(wide.numel(), wide.device)
        wide.view(torch.int32).add_(drawn).add_(0x8000).bitwise_and_(-0x10000)
        # A carry turns some NaNs into an infinity or a zero.
        return wide.masked_fill_(is_nan, float("nan"))

    def _bits(self, count: int, device: torch.device) -> torch.Tensor:
        """Uniform random signed 16-bit numbers."""
        generator = self._generators.get(device)
        if generator is None:
            generator = torch.Generator(device).manual_seed(self._seed)
            self._generators[device] = generator
        # Each 64-bit word holds four numbers.
        words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
        return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]


def multiply_rounded_once(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies numbers of half precision in place by a factor that keeps all its digits.

    Args:
        x: a dense tensor without gaps in memory.
        factor: a scalar on the same device.
    """
    wide = factor.float()
    for part in _flat(x).split(_BLOCK):
        part.copy_(part.float().mul_(wide))


def _blocks(
    total: torch.Tensor, gradient: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of a sum and the same blocks of a gradient, small enough to be widened."""
    if gradient.stride() != total.stride():
        gradient = torch.empty_like(total).copy_(gradient)
    return zip(_flat(total).split(_BLOCK), _flat(gradient).split(_BLOCK), strict=True)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """All numbers of a tensor without gaps, as they lie in memory."""
    return x.as_strided((x.numel(),), (1,))
