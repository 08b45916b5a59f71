"""Saves the counters and lists that a trainer's loss changes, so that a window can run again."""

import numbers
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sized
from typing import Any

import torch

# Exactly these classes, because a user's class may refuse to be emptied.
_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)
_PLAIN = (numbers.Number, str, bytes, type(None), torch.Tensor, *_CONTAINERS, tuple)
# Attributes that hold rows. No loss changes them, and there may be many rows.
_ROWS = ("train_dataset", "eval_dataset")

# A trainer may count in a tensor of at most this many numbers.
_COUNTS = 2**16


class PlainAttributes:
    """The present attributes of an object that are numbers, texts, tensors or containers.

    Containers keep their identity, so other holders see the same object. Their contents are kept by
    reference, except for containers in containers and small tensors, which are kept by value.

    Args:
        owner: the object.
        nested: whether containers in containers may change.
    """

    def __init__(self, owner: Any, *, nested: bool):
        self._owner = owner
        self._before: dict[str, Any] = {}
        self._held: dict[int, tuple[Any, Any]] = {}
        self._tensors: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        for name, value in vars(owner).items():
            if name not in _ROWS and isinstance(value, _PLAIN):
                self._before[name] = value
        self._keep_tensors(self._before.values())
        self._keep(self._before.values(), nested)

    def held(self, container: Any) -> Sized:
        """The contents of a container when this object was made; empty if it did not exist.

        Args:
            container: the present value of an attribute.
        """
        found: Sized = self._held.get(id(container), (None, ()))[1]
        return found

    def restore(self) -> None:
        """Puts back what has changed, and removes what is new."""
        attributes = vars(self._owner)
        for name in [x for x in attributes if x not in self._before]:
            if name not in _ROWS and isinstance(attributes[name], _PLAIN):
                del attributes[name]
        attributes.update(self._before)
        for container, content in self._held.values():
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(content)
        for index, (tensor, version, value) in enumerate(self._tensors):
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)
                self._tensors[index] = tensor, tensor._version, value

    def _keep(self, values: Iterable[Any], nested: bool) -> None:
        for value in values:
            if type(value) in _CONTAINERS and id(value) not in self._held:
                self._held[id(value)] = value, value.copy()
            elif type(value) is not tuple:
                continue
            if nested:
                inside = value.values() if isinstance(value, dict) else value
                if isinstance(value, dict):
                    self._keep_tensors(inside)
                self._keep(inside, nested)

    def _keep_tensors(self, values: Iterable[Any]) -> None:
        for value in values:
            if not isinstance(value, torch.Tensor) or value.is_inference():
                continue
            if value.numel() <= _COUNTS:
                self._tensors.append((value, value._version, value.detach().clone()))
