"""Buffers that sum gradients of half precision, each multiplied by its factor."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from virtualbatch.torch._commit import added, widened
from virtualbatch.torch._rounding import StochasticRounding
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._unhook import unhook

# Gradients with at most this many numbers stay in `.grad` while the next micro-batch runs forward.
# Their sums are in buffers. What stays only shows whether the loss function changes `.grad`.
_FEW = 4096


class GradientBuffers:
    """The sums of a window that are kept outside `.grad`.

    Args:
        parameters: trainable parameters, each once.
        rounding: adds dense gradients of bfloat16; None where they are summed in float32.

    Attributes:
        sums: the sum of each parameter; None where no gradient was summed in a buffer.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], rounding: StochasticRounding | None
    ):
        self.sums: list[torch.Tensor | None] = [None] * len(parameters)
        self._parameters = parameters
        self._rounding = rounding
        sizes = [parameter.numel() for parameter in parameters]
        # At least one gradient stays. If all are large, only the smallest stays, to save memory.
        few = [k for k, size in enumerate(sizes) if size <= _FEW]
        self._shown = frozenset(few or [sizes.index(min(sizes))])

    @contextmanager
    def collecting(self, factor: float, *, as_they_come: bool) -> Iterator[None]:
        """Moves the gradients of a backward pass inside the context into their buffers.

        Args:
            factor: what each gradient is multiplied by; the product is formed in float32.
            as_they_come: whether each gradient may be moved as soon as it is complete, because
                nothing else reads `.grad` at the end of the pass.
        """
        for k in self._shown:
            self._parameters[k].grad = None
        with ExitStack() as hooks:
            # Otherwise all gradients of a micro-batch would exist at once. They are as large as
            # the bfloat16 sums.
            if as_they_come and self._rounding is not None:
                for k, parameter in enumerate(self._parameters):
                    if parameter.dtype == torch.bfloat16 and k not in self._shown:
                        take = partial(self._take_dense, k, factor)
                        hooks.enter_context(Undo(partial(_leave, take, parameter)))
                        parameter.register_post_accumulate_grad_hook(take)
            yield
        for k, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                self._take(k, factor, parameter)

    def _take_dense(self, k: int, factor: float, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and not parameter.grad.is_sparse:
            self._take(k, factor, parameter)

    @torch.no_grad()
    def _take(self, k: int, factor: float, parameter: torch.Tensor) -> None:
        gradient, total = parameter.grad, self.sums[k]
        if gradient is None:
            raise ValueError("internal: a parameter without a gradient is asked for it.")
        if k not in self._shown:
            parameter.grad = None
        if total is None:
            self.sums[k] = self._first(gradient, factor)
        elif total.is_sparse or gradient.is_sparse:
            self.sums[k] = added(widened(total), widened(gradient) * factor)
        elif self._rounding is not None and total.dtype == torch.bfloat16:
            self._rounding.add(total, gradient, factor)
        else:
            total.add_(gradient, alpha=factor)

    def _first(self, gradient: torch.Tensor, factor: float) -> torch.Tensor:
        is_narrow = gradient.dtype == torch.bfloat16 and not gradient.is_sparse
        if self._rounding is not None and is_narrow:
            return self._rounding.first(gradient, factor)
        # The product is a copy. Later gradients are added to it in place, and a float32 gradient
        # may still belong to the graph.
        return widened(gradient) * factor


def _leave(take: Any, parameter: torch.nn.Parameter) -> None:
    unhook(take, parameter._post_accumulate_grad_hooks)
