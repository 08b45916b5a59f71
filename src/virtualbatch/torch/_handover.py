"""Finished gradients behind one autograd node: a backward call hands them to the parameters.

The window has already differentiated its micro-batches. Hooks on parameters are removed while the
window runs. They are called once, at the handover, with the gradient of the whole batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from virtualbatch.torch._commit import narrowed
from virtualbatch.torch._rounding import multiply_rounded_once
from virtualbatch.torch._stepping import node_hooks
from virtualbatch.torch._undo import Undo


class Finished:
    """The gradients of a window that has run, until they are handed over.

    Args:
        parameters: the parameters that get a gradient.
        gradients: one for each parameter; dense, sparse or sharded. For a parameter of half
            precision the gradient is float32, or has the dtype of the parameter.
        scale: the scale that is already in the gradients; None for 1.
        before: called when a backward pass reaches the gradients.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        scale: torch.Tensor | None = None,
        before: Callable[[], None] = lambda: None,
    ):
        self.parameters = parameters
        self._gradients: list[torch.Tensor] | None = list(gradients)
        self._scale = scale
        self._before = before

    def behind(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, with a graph that hands the gradients over in a backward pass.

        Args:
            loss: a detached scalar.
        """
        found: torch.Tensor = _HandOver.apply(loss, self, *self.parameters)
        return found

    def given(self, factor: torch.Tensor) -> list[torch.Tensor]:
        """Gives the gradients away, multiplied by the factor that arrived in the backward pass.

        Raises:
            RuntimeError: the gradients were handed over before, or `before` refuses this pass.
        """
        if self._gradients is None:
            raise RuntimeError(
                "The gradients of a window are handed over once. Got a second backward pass "
                "through the same loss. Call loss(...) again for new ones."
            )
        self._before()
        gradients, self._gradients = self._gradients, None
        if self._scale is not None:
            factor = factor / self._scale.to(factor)
        # A factor on a device is not read, because the host would wait for the window.
        is_one = factor.device.type == "cpu" and float(factor) == 1.0
        found = []
        gradients.reverse()
        for parameter in self.parameters:
            # The list must hold no reference, or PyTorch would copy the gradient into `.grad`.
            gradient = gradients.pop()
            if not is_one:
                gradient = _times(gradient, factor.to(gradient.device))
            found.append(narrowed(gradient, parameter.dtype))
        return found


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, finished: Finished, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.finished = finished
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[Any, ...]:
        # These gradients have no graph, so terms of second order would silently be 0.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The gradients of a window have no graph of their own. Got a backward pass with "
                "create_graph=True. Leave it out, or differentiate twice inside loss_fn."
            )
        return (None, None, *ctx.finished.given(factor))


def _times(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    if gradient.dtype == torch.bfloat16 and not gradient.is_sparse:
        # On a device PyTorch would round the factor first, with one error for all numbers.
        multiply_rounded_once(gradient, factor)
        return gradient
    return gradient.mul_(factor)


@contextmanager
def hooks_set_aside(owner: Any, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Removes all hooks on parameters inside the context, and puts them back after it.

    Args:
        owner: an object that lives as long as the parameters are trained.
        parameters: the parameters that take a gradient.
    """
    found: list[dict[Any, Any]] = [
        hooks
        for parameter in parameters
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        if hooks
    ]
    found += [hooks for _, hooks in node_hooks(owner, parameters)]
    with emptied(found):
        yield


@contextmanager
def emptied(found: Sequence[dict[Any, Any]]) -> Iterator[None]:
    """Empties dictionaries of hooks inside the context, and fills them again after it.

    Args:
        found: the dictionaries themselves. PyTorch holds these, and would not see copies.
    """
    kept = [dict(hooks) for hooks in found]

    def fill() -> None:
        for hooks, before in zip(found, kept, strict=True):
            hooks.update(before)

    with Undo(fill):
        for hooks in found:
            hooks.clear()
        yield
