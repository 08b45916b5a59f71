"""A loss for what has none: the sum over outputs of what they are times random numbers.

It is a sum over rows if fn computes each row from that row alone. So the machinery of the engine,
which plans, tries and certifies losses, does the same for a rowwise function.
"""

from collections.abc import Callable
from typing import Any

import torch

from virtualbatch.torch._batch import ONE_LEAF
from virtualbatch.torch._modules import Inventory
from virtualbatch.torch._window import Program
from virtualbatch.window.terms import SUM
from virtualbatch.window.tree import builder


def surrogate(fn: Callable[..., Any], shared: tuple[Any, ...], found: Inventory) -> Program:
    """The program of a function, by whose windows it is planned.

    Args:
        fn: (batch, *shared) -> outputs with one entry per row.
        shared: as the call was given them.
        found: what its modules hold.
    """

    def loss_fn(batch: Any) -> torch.Tensor:
        outputs: list[tuple[str, Any]] = []
        builder(fn(batch, *shared), "output", outputs, ONE_LEAF, lists=False)
        taken = [x for _, x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
        return torch.stack([x.sum() for x in taken]).sum()

    return Program(loss_fn, SUM, False, None, found)
