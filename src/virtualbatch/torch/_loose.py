"""Trained tensors that no module holds, each wrapped in a module made for it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch


class Loose(torch.nn.Module):
    """Holds one tensor as modules hold parameters.

    Args:
        tensor: a leaf that requires a gradient.

    Raises:
        ValueError: the tensor is no leaf, or requires no gradient.
    """

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        if not (tensor.is_leaf and tensor.requires_grad):
            what = "computed from others" if not tensor.is_leaf else "that takes no gradient"
            raise ValueError(
                "A tensor in module must be a leaf that requires a gradient. "
                f"Got one of shape {tuple(tensor.shape)} {what}. "
                "Pass the tensors that your optimizer has, or leave it out."
            )
        # register_parameter() accepts only Parameters, but a plain tensor may be trained too.
        self._parameters["tensor"] = tensor

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor."""
        found = self._parameters["tensor"]
        if found is None:
            raise ValueError("internal: a tensor was taken out of its module.")
        return found


def as_modules(given: Any) -> Iterator[Any]:
    """Yields what was given as `module`, one by one. Each tensor comes in a module of its own.

    Raises:
        ValueError: a tensor takes no gradient.
        TypeError: the caller gave the result of `Module.parameters()`.
    """
    if isinstance(given, torch.nn.Module | torch.Tensor):
        given = [given]
    if isinstance(given, Iterator) and getattr(given, "__name__", "") == "parameters":
        raise TypeError(
            "module must be the model itself, whose buffers and BatchNorm layers count too. "
            "Got its parameters(). Pass the model."
        )
    for each in given if isinstance(given, Iterable) else [given]:
        yield Loose(each) if isinstance(each, torch.Tensor) else each
