"""Gradients of a window: summed beside what `.grad` held, and added to it only at the end.

Where every parameter and term is float32 or wider, each micro-batch's share multiplies its loss
and PyTorch itself sums into a fresh `.grad`: no buffer, no extra arithmetic. Otherwise gradients
are taken unscaled and multiplied in the add to a float32 buffer.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from virtualbatch.window import accumulator_dtype

_HALF = (torch.float16, torch.bfloat16)


class WindowGradients:
    """Sums the gradients of a window's micro-batches.

    Args:
        parameters: trainable parameters, each once.
        backward_fn: scalar loss -> None; computes gradients into `.grad`.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        backward_fn: Callable[[torch.Tensor], Any] | None,
    ):
        self._parameters = parameters
        self._backward = backward_fn or torch.Tensor.backward
        self._before = [parameter.grad for parameter in parameters]
        self._sums: list[torch.Tensor | None] = [None] * len(parameters)
        self._half = any(parameter.dtype in _HALF for parameter in parameters)
        self._in_buffer: bool | None = None
        self.found_any = False
        self.loss_dtype: torch.dtype | None = None
        # What is there stays untouched until the window has succeeded.
        for parameter in parameters:
            parameter.grad = None

    def add(self, terms: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
        """Differentiates one micro-batch and adds its share of the gradient.

        Args:
            terms: scalar losses; those without a gradient only add to the loss.
            shares: one number per term. A term of share 0 is left out of what is differentiated,
                because its gradient may be NaN, and 0 times NaN is NaN.

        Returns:
            The micro-batch's share of the loss, detached; at least float32.
        """
        for term in terms:
            if self.loss_dtype is not term.dtype:
                self.loss_dtype = torch.promote_types(self.loss_dtype or term.dtype, term.dtype)
        kept = [(term, share) for term, share in zip(terms, shares, strict=True) if share]
        if self._in_buffer is None:
            self._in_buffer = self._half or any(term.dtype in _HALF for term in terms)
            if self._in_buffer:
                self._check_leaves(terms)
        if not self._in_buffer:
            objective = _total(_times(term, share) for term, share in kept)
            self._differentiate(objective)
            return objective.detach()
        # Only the ratio of the shares goes through the backward pass, where a share would be
        # rounded to few bits and could underflow.
        largest = max(share for _, share in kept)
        self._differentiate(_total(_times(term, share / largest) for term, share in kept))
        self._collect(largest)
        return _total(_widened(term.detach()) * share for term, share in kept)

    def zero(self) -> None:
        """Makes every gradient found so far zero, NaN included."""
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            for gradient in (parameter.grad, total):
                if gradient is not None:
                    gradient.zero_()

    def commit(self) -> None:
        """Adds the window's gradients to what `.grad` held before it."""
        with torch.no_grad():
            for parameter, before, total in zip(
                self._parameters, self._before, self._sums, strict=True
            ):
                found = parameter.grad if total is None else total
                parameter.grad = _committed(parameter, before, found)

    def restore(self) -> None:
        """Puts back what `.grad` held before the window."""
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.grad = before

    def _differentiate(self, objective: torch.Tensor) -> None:
        # A branch may leave a micro-batch without parameters: its gradient is zero.
        if objective.requires_grad:
            self.found_any = True
            with _outside_autocast(objective.device.type):
                self._backward(objective)

    def _collect(self, factor: float) -> None:
        """Moves each `.grad` times factor into its buffer; the product is formed there, wide."""
        with torch.no_grad():
            for k, parameter in enumerate(self._parameters):
                gradient, total = parameter.grad, self._sums[k]
                if gradient is None:
                    continue
                parameter.grad = None
                if total is None:
                    # In place after a copy: a float32 gradient may still belong to the graph.
                    self._sums[k] = _widened(gradient) * factor
                elif total.is_sparse or gradient.is_sparse:
                    self._sums[k] = _sum(total, _widened(gradient) * factor)
                else:
                    total.add_(gradient, alpha=factor)

    def _check_leaves(self, terms: Sequence[torch.Tensor]) -> None:
        """Refuses leaves that would be given gradients without their share.

        PyTorch adds to the `.grad` of every leaf that a loss reaches, and the buffer sees those
        of the module only.
        """
        known = {id(parameter) for parameter in self._parameters}
        seen: set[Any] = set()
        stack = [term.grad_fn for term in terms]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise ValueError(
                    "With half-precision parameters or losses, module must hold every tensor "
                    f"that takes a gradient. Got one of shape {tuple(leaf.shape)} and dtype "
                    f"{leaf.dtype} that is in no module. Pass module=[...] with all modules."
                )
            stack.extend(following for following, _ in node.next_functions)


def _times(term: torch.Tensor, factor: float) -> torch.Tensor:
    # A window of one micro-batch is the ordinary computation, to the bit.
    return term if factor == 1.0 else term * factor


def _total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    first, *others = parts
    for part in others:
        first = first + part
    return first


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.to(getattr(torch, accumulator_dtype(str(x.dtype).removeprefix("torch."))))


def _sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # PyTorch adds sparse to dense, but not dense to sparse.
    return b + a if a.is_sparse and not b.is_sparse else a + b


def _committed(
    parameter: torch.Tensor, before: torch.Tensor | None, found: torch.Tensor | None
) -> torch.Tensor | None:
    if found is None:
        return before
    if before is None:
        # Many entries of one sparse row would be added in few bits by whoever reads them.
        if found.is_sparse and found.dtype != parameter.dtype:
            found = found.coalesce()
        return found.to(parameter.dtype)
    if before.is_sparse != found.is_sparse and before.is_sparse:
        return _sum(before, found).to(before.dtype)
    if before.dtype == found.dtype:
        return before.add_(found)
    total = _sum(_widened(before), found)
    if not total.is_sparse:
        return before.copy_(total)
    return total.coalesce().to(before.dtype)


def _outside_autocast(device_type: str) -> Any:
    """Backward operations take the dtypes of their forward; autocast must not choose again."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
