"""Gradients with memory of their own, so that an add to one does not change another.

If two parameters are added through views, as in `p[None] + q[None]`, PyTorch's first backward pass
gives both `.grad`s the same memory. Every later pass then adds to that memory twice.
"""

from collections.abc import Sequence
from operator import itemgetter

import torch


class OwnMemory:
    """Watches the first gradient that each parameter gets in a window.

    Args:
        parameters: tensors that take a gradient, each once. They have no gradient now.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self._without = parameters

    def give(self) -> None:
        """Copies gradients that share memory. Call it after every backward pass."""
        if not self._without:
            return
        waiting = []
        found = []
        for parameter in self._without:
            gradient = parameter.grad
            if gradient is None:
                waiting.append(parameter)
            else:
                found += [(*place, parameter) for place in _places(gradient)]
        self._without = waiting
        if len(found) < 2:
            return
        # Gradients may lie side by side in one memory, as after `torch.cat`. That does no harm.
        found.sort(key=itemgetter(0))
        end = 0
        for begin, size, parameter in found:
            if begin < end:
                # Never None: the gradient was found above.
                parameter.grad = parameter.grad.clone()
            else:
                end = begin + size


def _places(x: torch.Tensor) -> list[tuple[int, int]]:
    """Address and size of each memory that is added to in place; nothing where it is unknown."""
    if type(x) is torch.Tensor:
        # Sparse gradients are never added to in place. Meta tensors have no address.
        return [(x.data_ptr(), x.nbytes)] if x.layout == torch.strided and x.data_ptr() else []
    # A wrapper such as DTensor has no memory, but the tensors inside have. A fake tensor has none
    # inside.
    flatten = getattr(x, "__tensor_flatten__", None)
    if flatten is None:
        return []
    return [place for name in flatten()[0] for place in _places(getattr(x, name))]
