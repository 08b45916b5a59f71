"""Gradients of a window: summed beside what `.grad` held, and added to it only at the end.

Where every parameter and term is float32 or wider, each backward pass starts from the
micro-batch's share and PyTorch itself sums into a fresh `.grad`: no buffer, no extra arithmetic.
Otherwise gradients are taken unscaled and multiplied in the add to a float32 buffer.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from virtualbatch.torch._own_memory import OwnMemory
from virtualbatch.torch._stats import GradientNorms
from virtualbatch.window.shares import accumulator_dtype

HALF = {torch.float16, torch.bfloat16}

# (terms, factors): adds the gradient of their weighted sum to every `.grad`.
_Differentiate = Callable[[Sequence[torch.Tensor], Sequence[float]], None]


class WindowGradients:
    """Sums the gradients of a window's micro-batches.

    Args:
        parameters: trainable parameters, each once.
        backward_fn: scalar loss -> None; computes gradients into `.grad`.
        norms: is told of scaled losses; None if nobody asks for norms.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        backward_fn: Callable[[torch.Tensor], Any] | None,
        norms: GradientNorms | None = None,
    ):
        self._parameters = parameters
        self._backward_fn = backward_fn
        self._norms = norms
        self._before = [parameter.grad for parameter in parameters]
        self._sums: list[torch.Tensor | None] = [None] * len(parameters)
        self._differentiate: _Differentiate | None = None
        self._in_place = True
        self._own_memory = OwnMemory(parameters)
        self.found_any = False
        # What the gradients of the latest micro-batch lacked of their share on their way.
        self.factor = 1.0

    def start(self) -> None:
        """Puts what `.grad` holds aside, untouched until the window has succeeded."""
        for parameter, before in zip(self._parameters, self._before, strict=True):
            if before is not None:
                parameter.grad = None
                self._in_place = False

    def add(self, terms: Collection[torch.Tensor], shares: Sequence[float]) -> None:
        """Differentiates one micro-batch and adds its share of the gradient.

        Args:
            terms: scalar losses; those without a gradient add nothing.
            shares: one number per term. A term of share 0 is left out, because its gradient may
                be NaN, and 0 times NaN is NaN.
        """
        if self._differentiate is None:
            self._differentiate = self._chosen(terms)
        reached, factors = [], []
        for term, share in zip(terms, shares, strict=True):
            # A branch may leave a micro-batch without parameters: its gradient is zero.
            if share and term.requires_grad:
                reached.append(term)
                factors.append(share)
        if reached:
            self.found_any = True
            self._differentiate(reached, factors)
            self._own_memory.give()

    def zero(self) -> None:
        """Makes every gradient found so far zero, NaN included."""
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            for gradient in (parameter.grad, total):
                if gradient is not None:
                    gradient.zero_()

    def sums(self) -> list[torch.Tensor]:
        """The window's gradients before they are committed."""
        pairs = zip(self._parameters, self._sums, strict=True)
        found = [parameter.grad if total is None else total for parameter, total in pairs]
        return [gradient for gradient in found if gradient is not None]

    def commit(self) -> None:
        """Adds the window's gradients to what `.grad` held before it."""
        if self._in_place:
            return
        entries = list(zip(self._parameters, self._before, self._sums, strict=True))
        # What allocates comes first: if memory runs out, nothing that `.grad` held has changed.
        entries.sort(key=lambda entry: entry[1] is not None)
        with torch.no_grad():
            for parameter, before, total in entries:
                found = parameter.grad if total is None else total
                parameter.grad = committed(parameter, before, found)

    def restore(self) -> None:
        """Puts back what `.grad` held before the window."""
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.grad = before

    def _chosen(self, terms: Collection[torch.Tensor]) -> _Differentiate:
        """How the window is differentiated, by its first losses."""
        chosen: _Differentiate = _from_factors
        if self._backward_fn is not None:
            chosen = _through(self._backward_fn, self._norms)
        device = next(iter(terms)).device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            chosen = _outside_autocast(chosen, device)
        if not HALF.isdisjoint([x.dtype for x in (*self._parameters, *terms)]):
            self._check_leaves(terms)
            self._in_place = False
            self._own_memory = OwnMemory(())
            chosen = self._in_buffers(chosen)
        return chosen

    def _in_buffers(self, differentiate: _Differentiate) -> _Differentiate:
        def buffered(terms: Sequence[torch.Tensor], shares: Sequence[float]) -> None:
            # Only the ratio of the shares goes through the backward pass, where a share would be
            # rounded to few bits and could underflow.
            largest = max(shares)
            differentiate(terms, [share / largest for share in shares])
            self._collect(largest)
            self.factor = largest

        return buffered

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

    def _check_leaves(self, terms: Collection[torch.Tensor]) -> None:
        """Refuses leaves that would be given gradients without their share.

        PyTorch adds to the `.grad` of every leaf that a loss reaches, and the buffer sees those
        of the module only.
        """
        leaf = unknown_leaf(terms, self._parameters)
        if leaf is not None:
            raise ValueError(
                "With half-precision parameters or losses, module must hold every tensor "
                f"that takes a gradient. Got one of shape {tuple(leaf.shape)} and dtype "
                f"{leaf.dtype} that is in no module. Pass module=[...] with all modules."
            )


def _from_factors(terms: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
    # Where the backward pass starts, factors cost no multiplication of their own. A start is never
    # used twice: where a term is a view of a parameter, it becomes its `.grad` and is added to.
    starts = [torch.full_like(term, factor) for term, factor in zip(terms, factors, strict=True)]
    torch.autograd.backward(terms, starts)


def _through(
    backward_fn: Callable[[torch.Tensor], Any], norms: GradientNorms | None
) -> _Differentiate:
    def differentiate(terms: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
        first, *others = (
            # A window of one micro-batch is the ordinary computation, to the bit.
            term if factor == 1.0 else term * factor
            for term, factor in zip(terms, factors, strict=True)
        )
        loss = sum(others, first)
        if norms is not None:
            norms.hear_scale(loss)
        backward_fn(loss)

    return differentiate


def _outside_autocast(differentiate: _Differentiate, device: str) -> _Differentiate:
    """Backward operations take the dtypes of their forward; autocast must not choose again."""

    def outside(terms: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
        with torch.autocast(device, enabled=False):
            differentiate(terms, factors)

    return outside


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.to(getattr(torch, accumulator_dtype(str(x.dtype).removeprefix("torch."))))


def _sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # PyTorch adds sparse to dense, but not dense to sparse.
    return b + a if a.is_sparse and not b.is_sparse else a + b


def unknown_leaf(
    terms: Collection[torch.Tensor], parameters: Collection[torch.Tensor]
) -> torch.Tensor | None:
    """A tensor that losses take a gradient of and that is no parameter; None if there is none.

    Args:
        terms: scalar losses.
        parameters: all that are known.
    """
    known = {id(parameter) for parameter in parameters}
    seen: set[Any] = set()
    stack = [term.grad_fn for term in terms]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: torch.Tensor | None = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            return leaf
        stack.extend(following for following, _ in node.next_functions)
    return None


def committed(
    parameter: torch.Tensor, before: torch.Tensor | None, found: torch.Tensor | None
) -> torch.Tensor | None:
    """What `.grad` of a parameter becomes after a window.

    Args:
        parameter: the parameter.
        before: what `.grad` held before; changed in place where it can take the sum.
        found: the gradient of the window, which may be changed; None for none.
    """
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
    if not found.is_sparse and torch.promote_types(before.dtype, found.dtype) == found.dtype:
        return before.copy_(found.add_(before))
    total = _sum(_widened(before), found)
    if not total.is_sparse:
        return before.copy_(total)
    return total.coalesce().to(before.dtype)
