"""Which size a window is cut by, and what it depends on where it is planned."""

from typing import Any
from weakref import WeakKeyDictionary

import torch

from virtualbatch.plan.auto import Auto, Leaf, Signature
from virtualbatch.torch._batch import named_leaves
from virtualbatch.torch._modules import Inventory
from virtualbatch.window.tree import common_rows

# For as long as a module lives: its plans, and sizes that were made smaller.
_KEPT: WeakKeyDictionary[torch.nn.Module, Auto] = WeakKeyDictionary()


def kept_sizes(module: torch.nn.Module) -> Auto:
    """The sizes of a module for which the user keeps none."""
    found = _KEPT.get(module)
    if found is None:
        found = _KEPT[module] = Auto()
    return found


def signature(batch: Any, found: Inventory) -> Signature:
    """What a plan for a batch depends on.

    Args:
        batch: a batch, not a Window.
        found: what the modules hold.
    """
    tensors = [(place, x) for place, x in named_leaves(batch) if isinstance(x, torch.Tensor)]
    rows = common_rows(tensors)
    if rows is None:
        raise ValueError("internal: a batch of PyTorch has no number of rows.")
    parameters = ", ".join(f"{_name(p.dtype)}{list(p.shape)}" for p in found.parameters)
    device = found.accelerator or torch.device("cpu")
    return Signature(
        f"torch on {device.type}, parameters {parameters}",
        rows,
        tuple(Leaf(place, tuple(x.shape[1:]), _name(x.dtype)) for place, x in tensors),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
