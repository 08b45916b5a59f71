"""Sums in bfloat16 with stochastic rounding, which has no bias.

It rounds up with the probability that the remainder gives. With rounding to nearest, a sum stops
growing when a term is less than half of its last digit. Compensated sums do not stop, but need a
second buffer, which costs as much as float32.
"""

from collections.abc import Iterator

import torch

# Numbers that are widened at once: 40 MiB in passing, and few kernels for a large parameter.
_BLOCK = 2**22


class StochasticRounding:
    """Adds gradients to sums in bfloat16.

    Its random numbers are its own: no other generator moves, and the same seed and the same
    gradients give the same sums.

    Args:
        seed: of its random numbers.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def first(self, gradient: torch.Tensor, factor: float) -> torch.Tensor:
        """A new sum.

        Args:
            gradient: of bfloat16, dense, of any shape.
            factor: what it is multiplied by, in float32.
        """
        # Never in place: a gradient may still belong to the graph.
        total = torch.empty_like(gradient)
        for kept, part in _blocks(total, gradient):
            kept.copy_(self._rounded(part.float().mul_(factor)))
        return total

    def add(self, total: torch.Tensor, gradient: torch.Tensor, factor: float) -> None:
        """Adds to a sum in place; the new sum is formed in float32 and rounded once.

        Args:
            total: what `first` returned.
            gradient: see there.
            factor: see there.
        """
        for kept, part in _blocks(total, gradient):
            kept.copy_(self._rounded(kept.float().add_(part, alpha=factor)))

    def _rounded(self, wide: torch.Tensor) -> torch.Tensor:
        """Rounds float32 in place to numbers of bfloat16: those of its upper 16 bits.

        Source:
            Zamirai, Zhang, Aberger, De Sa: Revisiting BFloat16 Training (2020).
        """
        is_nan = wide.isnan()
        # A random number below the last kept bit carries into it as often as the remainder says.
        drawn = self._bits(wide.numel(), wide.device)
        wide.view(torch.int32).add_(drawn).add_(0x8000).bitwise_and_(-0x10000)
        # A carry makes an infinity, or a zero, of some of them.
        return wide.masked_fill_(is_nan, float("nan"))

    def _bits(self, count: int, device: torch.device) -> torch.Tensor:
        """Uniform numbers of 16 bits with a sign."""
        generator = self._generators.get(device)
        if generator is None:
            generator = torch.Generator(device).manual_seed(self._seed)
            self._generators[device] = generator
        # Four are drawn at once.
        words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
        return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]


def multiply_rounded_once(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies numbers of half precision in place by a factor that keeps all its digits.

    Args:
        x: dense; it has no gaps in memory.
        factor: a scalar on its device.
    """
    wide = factor.float()
    for part in _flat(x).split(_BLOCK):
        part.copy_(part.float().mul_(wide))


def _blocks(
    total: torch.Tensor, gradient: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same parts of a sum and a gradient, as far as they are widened at once."""
    if gradient.stride() != total.stride():
        gradient = torch.empty_like(total).copy_(gradient)
    return zip(_flat(total).split(_BLOCK), _flat(gradient).split(_BLOCK), strict=True)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """All numbers of a tensor without gaps, as they lie in memory."""
    return x.as_strided((x.numel(),), (1,))
