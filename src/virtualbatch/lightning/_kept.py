"""Saves what a training step changes beside parameters and buffers, so that it can run again."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection

# Attributes of PyTorch's own modules. The engine changes them while it plans, and puts them back.
_OF_PYTORCH = frozenset(vars(torch.nn.Module()))

# A module may count in a tensor of at most this many numbers, beside parameters and buffers.
_COUNTS = 2**16


class Kept:
    """The present attributes of a module and of its metrics.

    Metrics hold their counts in attributes that are not buffers. Modules collect outputs in lists,
    and count in numbers and small tensors. Lists, sets and dictionaries keep their identity, but
    their contents are put back. The values of small tensors and of a metric's tensors are put back
    too.

    Args:
        module: the LightningModule.
    """

    def __init__(self, module: torch.nn.Module):
        self._attributes: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        self._contents: list[Callable[[], None]] = []
        for layer in module.modules():
            is_metric = isinstance(layer, Metric | MetricCollection)
            if layer is not module and not is_metric:
                continue
            attributes = {k: v for k, v in vars(layer).items() if k not in _OF_PYTORCH}
            self._attributes.append((layer, attributes))
            for value in attributes.values():
                self._keep(value, is_metric)

    def put_back(self) -> None:
        """Puts everything back. It may be called several times."""
        for layer, attributes in self._attributes:
            found = vars(layer)
            for name in [x for x in found if x not in attributes and x not in _OF_PYTORCH]:
                del found[name]
            found.update(attributes)
        for put_back in self._contents:
            put_back()

    def _keep(self, value: Any, of_metric: bool) -> None:
        if isinstance(value, torch.Tensor):
            # A tensor of inference mode cannot be changed outside that mode. Modules count in small
            # tensors. A large one may hold a data set.
            is_small = of_metric or value.numel() <= _COUNTS
            if is_small and not value.is_inference():
                self._contents.append(_of_tensor(value))
        elif isinstance(value, list):
            self._contents.append(_of_list(value))
        elif isinstance(value, deque):
            self._contents.append(_of_others(value, deque.extend))
        elif isinstance(value, set):
            self._contents.append(_of_others(value, set.update))
        elif isinstance(value, dict):
            self._contents.append(_of_others(value, dict.update))
            for each in value.values():
                if isinstance(each, list | set | dict | deque | torch.Tensor):
                    self._keep(each, of_metric)


def _of_tensor(tensor: torch.Tensor) -> Callable[[], None]:
    version, value = tensor._version, tensor.detach().clone()

    def put_back() -> None:
        nonlocal version
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(value)
            version = tensor._version

    return put_back


def _of_list(found: list[Any]) -> Callable[[], None]:
    before = list(found)

    def put_back() -> None:
        found[:] = before

    return put_back


def _of_others(found: Any, fill: Callable[[Any, Any], Any]) -> Callable[[], None]:
    before = found.copy()

    def put_back() -> None:
        found.clear()
        fill(found, before)

    return put_back
