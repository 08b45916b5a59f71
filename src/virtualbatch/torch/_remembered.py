"""What is remembered about a trained module, for as long as the module lives."""

from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from virtualbatch.certify.proven import Proven
from virtualbatch.plan.auto import Auto
from virtualbatch.torch._not_finite import ModuleLosses


class Remembered(NamedTuple):
    """What is remembered about a module.

    Fields:
        proven: the losses that were tried with the module.
        sizes: the plans of the module, and sizes that were made smaller.
        losses: receives the losses of the module's windows.
    """

    proven: Proven
    sizes: Auto
    losses: ModuleLosses


_REMEMBERED: Any = WeakIdKeyDictionary()


def remembered(owner: torch.nn.Module | torch.Tensor) -> Remembered:
    """What is remembered about a module.

    Args:
        owner: the module or tensor that `Inventory.owner` names.
    """
    found: Remembered | None = _REMEMBERED.get(owner)
    if found is None:
        found = _REMEMBERED[owner] = Remembered(Proven(), Auto(), ModuleLosses())
    return found
