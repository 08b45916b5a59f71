"""Gradients with memory of their own, so that what is added to one is not added to another.

Where two parameters are added as views of themselves, as in `p[None] + q[None]`, the first backward
pass of PyTorch lets both `.grad`s have the same memory. Every later pass then adds to it twice.
"""

from collections.abc import Sequence
from operator import itemgetter

import torch


class OwnMemory:
    """Watches the first gradient that each parameter gets in a window.

    Args:
        parameters: tensors that take a gradient, each once and without one now.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self._without = parameters

    def give(self) -> None:
        """Copies gradients that share memory; to be called after every backward pass."""
        if not self._without:
            return
        waiting = []
        found = []
        for parameter in self._without:
            gradient = parameter.grad
            if gradient is None:
                waiting.append(parameter)
            else:
                found += [(begin, size, parameter) for begin, size in _places(gradient)]
        self._without = waiting
        if len(found) < 2:
            return
        # Parts of one memory may lie side by side, as those of `torch.cat` do; they are no harm.
        found.sort(key=itemgetter(0))
        end = 0
        for begin, size, parameter in found:
            if begin < end:
                # Never None: it was found above.
                parameter.grad = parameter.grad.clone()
            else:
                end = begin + size


def _places(x: torch.Tensor) -> list[tuple[int, int]]:
    """Address and bytes of each memory that is added to in place; none where it cannot be told."""
    if type(x) is torch.Tensor:
        # Sparse gradients are never added to in place. Meta tensors have no address.
        return [(x.data_ptr(), x.nbytes)] if x.layout == torch.strided and x.data_ptr() else []
    # A wrapper such as DTensor has no memory, and what it wraps has. Fake tensors wrap nothing.
    flatten = getattr(x, "__tensor_flatten__", None)
    if flatten is None:
        return []
    return [place for name in flatten()[0] for place in _places(getattr(x, name))]
