"""Buffers of modules, copied before a window, so that a failed window can restore them."""

from collections.abc import Iterator, Sequence

import torch

# Running statistics are small. A copy of larger buffers, such as packed weights of a quantised
# layer, would cost more memory than a micro-batch saves.
LARGEST_COPIED = 64 * 2**20


class Places:
    """The buffers of modules, as objects at their places.

    Args:
        layers: modules, each once. Only their own buffers count, not those of submodules.
    """

    def __init__(self, layers: Sequence[torch.nn.Module]):
        self._places = [
            (layer, name, buffer) for layer in layers for name, buffer in layer._buffers.items()
        ]

    def tensors(self) -> Iterator[torch.Tensor]:
        """The buffers."""
        return (buffer for _, _, buffer in self._places if buffer is not None)

    def restore(self) -> None:
        """Puts every buffer object back to its place."""
        for layer, name, buffer in self._places:
            if layer._buffers.get(name) is not buffer:
                layer._buffers[name] = buffer


class Buffers:
    """Copies of the buffers of modules.

    Args:
        layers: modules, each once. Only their own buffers count, not those of submodules.
    """

    def __init__(self, layers: Sequence[torch.nn.Module]):
        self._places = Places(layers)
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for buffer in self._places.tensors():
            if id(buffer) in self._copies:
                continue
            if buffer.numel() * buffer.element_size() <= LARGEST_COPIED:
                self._copies[id(buffer)] = (buffer, buffer.detach().clone())
        self._versions = versions_of([buffer for buffer, _ in self._copies.values()])

    def copy_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The value of a buffer when this object was made; a detached tensor."""
        return self._copies[id(buffer)][1]

    def restore(self) -> None:
        """Puts back every buffer: the same objects with the same values."""
        self._places.restore()
        # All buffers are written: versions do not show what the kernels of BatchNorm wrote.
        with torch.no_grad(), self._versions:
            for buffer, copied in self._copies.values():
                buffer.copy_(copied)


def versions_of(
    tensors: Sequence[torch.Tensor],
) -> torch.autograd.grad_mode._unsafe_preserve_version_counter:
    """A context after which tensors have the same versions as before.

    It is for values that are put back, and for statistics, which PyTorch's own kernels write in the
    same way. Graphs that keep such a tensor for their backward pass are still right.

    Args:
        tensors: buffers.
    """
    counted = tuple(x for x in tensors if not x.is_inference())
    return torch.autograd.grad_mode._unsafe_preserve_version_counter(counted)
