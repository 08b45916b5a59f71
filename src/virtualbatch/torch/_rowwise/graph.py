"""Refuses a graph of fn that reaches tensors from outside of fn.

Both passes call fn again for each micro-batch. So the graphs of two micro-batches may share only
known leaves. Any other shared leaf would get no gradient. A shared node belongs to a graph that was
recorded outside of fn, and the first backward pass would use it up.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef


class Graphs:
    """The graphs of the first two micro-batches.

    Args:
        parameters: the parameters that modules hold and that take a gradient.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self._parameters = frozenset(map(id, parameters))
        self._seen = 0
        self._leaves: list[TensorWeakRef] = []

    def look(self, outputs: Iterable[Any], own: Iterable[torch.Tensor]) -> None:
        """Checks the graph of one micro-batch.

        Args:
            outputs: what fn returned for the micro-batch.
            own: the leaves that fn was given.

        Raises:
            ValueError: a node or leaf comes from outside, or a node calls backward itself.
        """
        if self._seen == 2:
            return
        self._seen += 1
        known = self._parameters.union(map(id, own))
        tensors = [x for x in outputs if isinstance(x, torch.Tensor)]
        leaves = [x for x in tensors if x.is_leaf and x.requires_grad]
        for node in _nodes(x.grad_fn for x in tensors):
            leaf: torch.Tensor | None = getattr(node, "variable", None)
            if leaf is not None:
                leaves.append(leaf)
            else:
                self._check_node(node)
        for leaf in leaves:
            if id(leaf) not in known:
                self._check_leaf(leaf)

    def _check_node(self, node: Any) -> None:
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "torch.utils.checkpoint inside fn must be called with use_reentrant=False. "
                "Got use_reentrant=True, which differentiates by itself. Pass use_reentrant=False."
            )
        # The mark is kept with the node, so it is freed with the node.
        if self._seen == 1:
            node.metadata[_MARK] = self
        elif node.metadata.get(_MARK) is self:
            raise ValueError(
                "fn must not use a tensor that was computed outside of it with a gradient. "
                "Got one in its closure. Pass it as an argument: encode(batch, tensor)."
            )

    def _check_leaf(self, leaf: torch.Tensor) -> None:
        # A leaf that fn makes itself is a new object in each call.
        again = any(reference() is leaf for reference in self._leaves)
        if again or isinstance(leaf, torch.nn.Parameter):
            raise ValueError(
                "module must hold every tensor that takes a gradient. "
                f"Got one of shape {tuple(leaf.shape)} and dtype {leaf.dtype} that is in no "
                "module. Pass module=[...] with all modules, or pass the tensor as an argument."
            )
        self._leaves.append(TensorWeakRef(leaf))


_MARK = "virtualbatch"


def _nodes(starts: Iterable[Any]) -> Iterator[Any]:
    """The nodes of a graph, each once."""
    seen: set[Any] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)
