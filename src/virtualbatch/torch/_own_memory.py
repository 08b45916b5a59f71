"""Gradients with memory of their own, so that what is added to one is not added to another.

Where two parameters are added as views of themselves, as in `p[None] + q[None]`, the first backward
pass of PyTorch lets both `.grad`s have the same memory. Every later pass then adds to it twice.
"""

from collections.abc import Sequence

import torch


class OwnMemory:
    """Watches the first gradient that each parameter gets in a window.

    Args:
        parameters: tensors that take a gradient, each once and without one now.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self._without = parameters
        self._taken: set[int] = set()

    def give(self) -> None:
        """Copies gradients that share memory; to be called after every backward pass."""
        found = [parameter for parameter in self._without if parameter.grad is not None]
        if not found:
            return
        self._without = [parameter for parameter in self._without if parameter.grad is None]
        # Memory that was freed since may be in use again: then a gradient is copied for nothing.
        for parameter in found:
            gradient = parameter.grad
            if gradient is None:
                continue
            memory = _memory(gradient)
            if memory and memory in self._taken:
                parameter.grad = gradient.clone()
            self._taken.add(memory)


def _memory(x: torch.Tensor) -> int:
    """Address of the memory of a tensor; 0 where it has none that can be told."""
    # Fake tensors and other wrappers have no address, sparse ones several.
    plain = type(x) is torch.Tensor and x.layout == torch.strided
    return x.untyped_storage().data_ptr() if plain else 0
