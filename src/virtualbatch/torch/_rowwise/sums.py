"""Sums of gradients apart from `.grad`, in float32 or wider."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from virtualbatch.torch._commit import added, narrowed, widened
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._unhook import unhook

# A hook costs as much as adding this many numbers. Smaller gradients are added after the pass.
_LARGE = 2**14


class GradientSums:
    """The sums of a pass.

    Gradients of large parameters are added during the backward pass, so that they never all exist
    at once.

    Args:
        tensors: the tensors that take a gradient.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._tensors = tensors
        self._totals: list[torch.Tensor | None] = [None] * len(tensors)
        # For large tensors, autograd collects these views instead of gradients: they hold no
        # memory.
        self._nothing = {
            k: x.new_zeros(()).expand_as(x)
            for k, x in enumerate(tensors)
            # Tensors of other classes, such as sharded ones, may have no such view.
            if x.numel() >= _LARGE and type(x) in (torch.Tensor, torch.nn.Parameter)
        }

    def add(
        self,
        outputs: Sequence[torch.Tensor],
        starts: Sequence[torch.Tensor],
        others: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor | None]:
        """Adds the gradients of a micro-batch.

        Args:
            outputs: the tensors to differentiate.
            starts: the gradients of the outputs.
            others: further leaves.

        Returns:
            The gradients of the further leaves.
        """
        with self._as_they_come():
            found = torch.autograd.grad(
                outputs, [*self._tensors, *others], starts, allow_unused=True
            )
        count = len(self._tensors)
        self.add_found(
            [None if k in self._nothing else gradient for k, gradient in enumerate(found[:count])]
        )
        return found[count:]

    @torch.no_grad()
    def add_found(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Adds gradients that already exist.

        Args:
            gradients: one for each tensor; None for no gradient.
        """
        totals, found = [], []
        for k, gradient in enumerate(gradients):
            total = self._totals[k]
            if gradient is None:
                continue
            if total is None or total.is_sparse or gradient.is_sparse:
                self._add(k, gradient)
            else:
                totals.append(total)
                found.append(gradient)
        if totals:
            torch._foreach_add_(totals, found)

    def taken(self) -> list[torch.Tensor | None]:
        """Gives the sums away, in the dtypes of the tensors."""
        totals, self._totals = self._totals, [None] * len(self._totals)
        totals.reverse()
        # The list must hold no reference, or PyTorch would copy the gradient into `.grad`.
        return [
            None if (total := totals.pop()) is None else narrowed(total, x.dtype)
            for x in self._tensors
        ]

    @torch.no_grad()
    def _add(self, k: int, gradient: torch.Tensor) -> None:
        total = self._totals[k]
        if total is None:
            # A copy, because a gradient may share memory with another gradient or the graph.
            wide = widened(gradient)
            self._totals[k] = wide.clone() if wide is gradient else wide
        elif total.is_sparse or gradient.is_sparse:
            self._totals[k] = added(total, widened(gradient))
        else:
            total.add_(gradient)

    @contextmanager
    def _as_they_come(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for k in self._nothing:
                take = partial(self._take, k)
                hooks.enter_context(Undo(partial(_leave, take, self._tensors[k])))
                self._tensors[k].register_hook(take)
            yield

    def _take(self, k: int, gradient: torch.Tensor) -> torch.Tensor:
        self._add(k, gradient)
        return gradient if gradient.is_sparse else self._nothing[k]


def _leave(take: Any, tensor: torch.Tensor) -> None:
    unhook(take, tensor._backward_hooks)
