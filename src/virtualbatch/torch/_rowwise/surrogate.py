"""A loss for a function without one: the sum of its outputs times random numbers.

The surrogate is a sum over rows if fn computes each row from that row alone. So the code that
plans, tries and certifies losses also works for a rowwise function.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from virtualbatch.torch._batch import ONE_LEAF
from virtualbatch.torch._loose import Loose
from virtualbatch.torch._modules import Inventory, inventory
from virtualbatch.torch._rowwise.outputs import check_outputs
from virtualbatch.torch._window import Program
from virtualbatch.window.terms import SUM
from virtualbatch.window.tree import builder


class Surrogate:
    """A function as the loss of a window.

    Args:
        fn: (batch, *shared) -> outputs with one entry per row.
        shared: the shared arguments of the call.
        found: what the modules of fn hold.
    """

    def __init__(self, fn: Callable[..., Any], shared: tuple[Any, ...], found: Inventory):
        self._fn = fn
        leaves: list[tuple[str, Any]] = []
        self._build = builder(shared, "shared", leaves, ONE_LEAF, lists=False)
        # Wrapped in modules: code that replaces what modules hold, by wider or fake tensors, then
        # replaces these too.
        self._shared = [
            Loose(x.detach().requires_grad_())
            if isinstance(x, torch.Tensor) and x.requires_grad
            else x
            for _, x in leaves
        ]
        trained = [x for x in self._shared if isinstance(x, Loose)]
        self.found = inventory([*found.roots, *trained], hands_over=True) if trained else found

    def outputs(self, batch: Any) -> list[tuple[str, Any]]:
        """The leaves that fn returns, each with the expression that reaches it.

        Args:
            batch: a batch or micro-batch.
        """
        found: list[tuple[str, Any]] = []
        shared = self._build([x.tensor if isinstance(x, Loose) else x for x in self._shared])
        builder(self._fn(batch, *shared), "output", found, ONE_LEAF, lists=False)
        return found

    def numbers(self, outputs: Sequence[tuple[str, Any]], rows: int) -> list[torch.Tensor]:
        """Random numbers, the same in each call, for all outputs that may have a gradient.

        Args:
            outputs: the outputs of some rows.
            rows: for how many rows to make numbers.
        """
        taken = [x for _, x in outputs if _is_floating(x)]
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn((rows, *x.shape[1:]), generator=generator, dtype=torch.float32).to(x)
            for x in taken
        ]

    def of_numbers(self) -> Program:
        """The program whose batches are pairs: rows, and numbers for each of their outputs."""

        def loss_fn(pair: tuple[Any, Sequence[torch.Tensor]]) -> torch.Tensor:
            batch, numbers = pair
            outputs = self.outputs(batch)
            check_outputs(outputs, len(numbers[0]))
            taken = [x for _, x in outputs if _is_floating(x)]
            sums = [(x * n).sum() for x, n in zip(taken, numbers, strict=True)]
            return torch.stack(sums).sum()

        return Program(loss_fn, SUM, False, None, self.found)

    def of_rows(self) -> Program:
        """The program whose batches are rows alone, for planning."""

        def loss_fn(batch: Any) -> torch.Tensor:
            return torch.stack([x.sum() for _, x in self.outputs(batch) if _is_floating(x)]).sum()

        return Program(loss_fn, SUM, False, None, self.found)


def _is_floating(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.is_floating_point()


def refuse_options(weight: Any, has_aux: bool) -> None:
    """Refuses options that only losses have.

    Raises:
        ValueError: one of them is given.
    """
    if weight is not None or has_aux:
        raise ValueError(
            "weight and has_aux belong to a loss. Got one of them with a rowwise function, which "
            "has no loss yet. Leave it out."
        )
