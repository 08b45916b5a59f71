"""Weights of a window, computed before its first forward pass.

The weights of all micro-batches are copied to the host at once, and checked there. After that, the
window reads nothing from a device.
"""

from collections.abc import Sequence
from typing import Any

import torch

from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.window.terms import GivenWeight
from virtualbatch.window.weights import HostWeights, host_weights


def window_weights(microbatches: Sequence[Microbatch], weight: GivenWeight) -> HostWeights:
    """Weights of a window's micro-batches.

    Args:
        microbatches: the micro-batches.
        weight: as for `host_weights`.

    Raises:
        ValueError: a weight is not valid, as in `host_weights`.
    """
    rows = [microbatch.rows for microbatch in microbatches]
    with torch.no_grad():
        return host_weights(rows, weight, (found.get() for found in microbatches), _on_host)


def _on_host(values: Sequence[Any]) -> list[float]:
    """The values as floats. All values on one device are copied at once."""
    result = [0.0 if isinstance(value, torch.Tensor) else float(value) for value in values]
    groups: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            groups.setdefault(value.device, []).append(index)
    for device, places in groups.items():
        # Apple's GPUs have no float64: https://github.com/pytorch/pytorch/issues/122602
        wide = torch.float32 if device.type == "mps" else torch.float64
        numbers = torch.stack([values[index].detach().to(wide) for index in places]).tolist()
        for index, number in zip(places, numbers, strict=True):
            result[index] = number
    return result
