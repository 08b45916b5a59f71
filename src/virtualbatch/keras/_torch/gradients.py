"""Gradients of a window on PyTorch, summed in `.grad` or in a wider buffer."""

from collections.abc import Sequence

import torch

from virtualbatch.keras._overwritten import updated
from virtualbatch.keras._rows import Rows
from virtualbatch.torch._own_memory import OwnMemory
from virtualbatch.torch._stats import GradientNorms
from virtualbatch.window.shares import accumulator_dtype


class Gradients:
    """Sums the gradients of a window's micro-batches, in `.grad` or in a buffer beside it.

    If every parameter is float32 or wider, PyTorch itself adds to a fresh `.grad`. Otherwise each
    gradient is computed for the mean over its micro-batch. Its share is multiplied when it is added
    to a float32 buffer, where few bits are lost. Gradients of overwritten variables are kept beside
    `.grad` too.

    Args:
        parameters: trainable parameters, each once.
        overwritten: for each parameter, whether its gradient is its new value.
        norms: closed at the end of each micro-batch; None if no statistics are needed.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        overwritten: Sequence[bool],
        norms: GradientNorms | None,
    ):
        self.parameters = parameters
        self._overwritten = [k for k, found in enumerate(overwritten) if found]
        self._norms = norms
        self._half = any(_wide(parameter) is not parameter.dtype for parameter in parameters)
        self._sums: list[torch.Tensor | None] = [None] * len(parameters)
        self._without_gradient: torch.Tensor | None = None
        self._found_any = False
        for parameter in parameters:
            parameter.grad = None
        self._own_memory = OwnMemory(updated(parameters, overwritten))

    def add(self, loss: torch.Tensor, rows: Rows) -> None:
        """Differentiates one micro-batch's part of the loss."""
        if not loss.requires_grad:
            # A branch in the model may use no parameter for this micro-batch: the gradient is 0.
            self._without_gradient = loss
            return
        self.add_product([loss], [torch.ones_like(loss)], rows)

    def add_product(
        self, tensors: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], rows: Rows
    ) -> None:
        """Adds the gradient of the sum of products of tensors and their cotangents.

        Args:
            tensors: tensors of one micro-batch, each with a graph.
            cotangents: one for each tensor, for this micro-batch's part of the window.
            rows: rows of the micro-batch and the window.
        """
        self._found_any = True
        share = rows.share("float32")
        # The backward pass of overwritten variables returns maxima for the window's loss. They
        # cannot be scaled later.
        later = share if self._half and not self._overwritten else 1.0
        torch.autograd.backward(
            tensors, cotangents if later == 1.0 else [given / later for given in cotangents]
        )
        self._keep_maxima()
        if self._half:
            self._add_wide(later)
        else:
            self._own_memory.give()
        if self._norms:
            self._norms.close(share, later)

    def _keep_maxima(self) -> None:
        for k in self._overwritten:
            gradient, largest = self.parameters[k].grad, self._sums[k]
            if gradient is not None:
                self.parameters[k].grad = None
                self._sums[k] = gradient if largest is None else torch.maximum(gradient, largest)

    def _add_wide(self, share: float) -> None:
        for k, parameter in enumerate(self.parameters):
            gradient, total = parameter.grad, self._sums[k]
            if gradient is None:
                continue
            parameter.grad = None
            if total is None:
                self._sums[k] = gradient.to(_wide(parameter)) * share
            else:
                total.add_(gradient, alpha=share)

    def finished(self) -> list[torch.Tensor | None]:
        """The window's gradients, which `.grad` then holds in the dtypes of the parameters."""
        if not self._found_any and self._without_gradient is not None:
            # Raises PyTorch's own error, as for the whole batch.
            self._without_gradient.backward()
        for k in range(len(self.parameters)) if self._half else self._overwritten:
            parameter, total = self.parameters[k], self._sums[k]
            parameter.grad = None if total is None else total.to(parameter.dtype)
        return [parameter.grad for parameter in self.parameters]


def _wide(parameter: torch.Tensor) -> torch.dtype:
    return getattr(torch, accumulator_dtype(str(parameter.dtype).removeprefix("torch.")))
