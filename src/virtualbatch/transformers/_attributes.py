"""Counters and lists of a trainer, which its loss changes, put back before a window runs again."""

import copy
import numbers
from collections import deque
from typing import Any

import torch

_PLAIN = (numbers.Number, str, bytes, type(None))


class PlainAttributes:
    """Attributes of an object that are numbers, texts or containers of them, as they are now.

    Args:
        owner: the object.
    """

    def __init__(self, owner: Any):
        self._owner = owner
        self._before = {
            name: copy.deepcopy(value) for name, value in vars(owner).items() if _is_plain(value)
        }

    def __getitem__(self, name: str) -> Any:
        return self._before.get(name)

    def restore(self) -> None:
        """Puts back what has changed, and takes away what is new."""
        attributes = vars(self._owner)
        for name in [x for x in attributes if x not in self._before and _is_plain(attributes[x])]:
            del attributes[name]
        for name, value in self._before.items():
            if name not in attributes or attributes[name] != value:
                attributes[name] = copy.deepcopy(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | deque):
        return all(map(_is_plain, value))
    if isinstance(value, torch.Tensor):
        # A number that nobody has waited for, as in a list of metrics.
        return not value.dim() and not value.requires_grad
    return isinstance(value, _PLAIN)
