"""Losses whose backward pass runs completely and gives zero gradients.

Ranks that gather parameters must all run the same backward passes, even for a micro-batch of
weight 0. The gradient of such a micro-batch may be NaN, and 0 times NaN is NaN. So zeros replace
the gradient on every path of the graph that no other loss shares.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch


def with_muted(terms: Sequence[torch.Tensor], factors: Sequence[float]) -> Sequence[torch.Tensor]:
    """The terms, where each term of factor 0 is replaced by a zero with zero gradients.

    Args:
        terms: scalar losses that take a gradient.
        factors: one number for each term.
    """
    if all(factors):
        return terms
    pairs = list(zip(terms, factors, strict=True))
    heard = _nodes(term for term, factor in pairs if factor)
    for node in _nodes(term for term, factor in pairs if not factor) - heard:
        node.register_hook(_zeros)
    return [term if factor else _Zero.apply(term) for term, factor in pairs]


class _Zero(torch.autograd.Function):
    """A loss of 0 with gradients of 0, whatever the given loss is."""

    @staticmethod
    def forward(ctx: Any, term: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(term)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient)


def _nodes(terms: Iterable[torch.Tensor]) -> set[Any]:
    """The nodes of a graph without its leaves, which pass nothing on."""
    found: set[Any] = set()
    stack = [term.grad_fn for term in terms]
    while stack:
        node = stack.pop()
        if node is None or node in found or hasattr(node, "variable"):
            continue
        found.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return found


def _zeros(given: Collection[torch.Tensor | None], _: Any) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if x is None else torch.zeros_like(x) for x in given)
