"""The leaves that a loss depends on, and those of them that no module of the window holds."""

import gc
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef


def leaves(terms: Collection[torch.Tensor]) -> list[torch.Tensor]:
    """The leaf tensors that get a gradient from some losses, each once.

    Args:
        terms: scalar losses.
    """
    seen: set[Any] = set()
    found = []
    stack = [term.grad_fn for term in terms]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: torch.Tensor | None = getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        stack.extend(following for following, _ in node.next_functions)
    return found


def foreign_leaves(
    terms: Collection[torch.Tensor], parameters: Collection[torch.Tensor]
) -> list[torch.Tensor]:
    """The leaves of some losses that are not known parameters.

    Args:
        terms: scalar losses.
        parameters: all known parameters.
    """
    known = {id(parameter) for parameter in parameters}
    return [leaf for leaf in leaves(terms) if id(leaf) not in known]


def refuse_unheld_parameter(
    terms: Collection[torch.Tensor], parameters: Collection[torch.Tensor]
) -> None:
    """Refuses a loss that reaches a parameter which no module of the window holds.

    Args:
        terms: scalar losses of a micro-batch, before their backward pass.
        parameters: all parameters that the modules hold and that take a gradient.

    Raises:
        ValueError: the loss reaches such a parameter.
    """
    for leaf in foreign_leaves(terms, parameters):
        if isinstance(leaf, torch.nn.Parameter):
            raise _unheld(leaf)


def refuse_shards(terms: Collection[torch.Tensor], parameters: Collection[torch.Tensor]) -> None:
    """Refuses a loss that uses sharded parameters where they are not gathered.

    The gradients of such shards are not added up over ranks.

    Args:
        terms: scalar losses of a micro-batch, before their backward pass.
        parameters: the shards.

    Raises:
        ValueError: the loss uses a shard.
    """
    known = {id(parameter) for parameter in parameters}
    for leaf in foreign_leaves(terms, ()):
        if id(leaf) in known:
            raise ValueError(
                "With fully_shard, parameters must be used in the forward pass of their module, "
                "where they are gathered. Got a loss that uses the shards of a parameter of shape "
                f"{tuple(leaf.shape)}. Move that computation, such as a penalty, into the forward "
                "pass."
            )


class ForeignLeaves:
    """Leaves that are no parameters, whose gradients PyTorch computes without their share.

    A loss function may make a leaf, such as inputs that require gradients. Such a leaf is freed
    with its micro-batch, so it is not trained. A leaf of the batch keeps its own `.grad`. Any other
    leaf that outlives the micro-batch may be trained by an optimizer.

    Args:
        terms: scalar losses of the first micro-batch, before their backward pass.
        parameters: all parameters that the modules hold and that take a gradient.
        is_given: leaf -> whether it belongs to the batch.

    Raises:
        ValueError: a parameter is in no module.
    """

    def __init__(
        self,
        terms: Collection[torch.Tensor],
        parameters: Collection[torch.Tensor],
        is_given: Callable[[torch.Tensor], bool],
    ):
        self._made: list[tuple[TensorWeakRef, torch.Tensor | None]] = []
        self._given: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        foreign = foreign_leaves(terms, parameters)
        for leaf in foreign:
            if isinstance(leaf, torch.nn.Parameter):
                raise _unheld(leaf)
        for leaf in foreign:
            if is_given(leaf):
                self._given.append((leaf, leaf.grad))
            else:
                self._made.append((TensorWeakRef(leaf), leaf.grad))

    def put_aside(self) -> None:
        """Takes the `.grad`s of the leaves away until `restore`."""
        for leaf in [*(reference() for reference, _ in self._made), *(x for x, _ in self._given)]:
            if leaf is not None:
                leaf.grad = None

    def check(self) -> None:
        """Refuses leaves that outlived their micro-batch. Call it after the micro-batch was freed.

        Raises:
            ValueError: there is such a leaf.
        """
        if any(reference() is not None for reference, _ in self._made):
            # A reference cycle may keep a leaf that no code can reach.
            gc.collect()
        alive = [leaf for reference, _ in self._made if (leaf := reference()) is not None]
        if alive:
            raise _unheld(alive[0])
        self._made = []

    def restore(self) -> None:
        """Puts back the `.grad`s of the leaves that still exist."""
        made = [(reference(), before) for reference, before in self._made]
        for leaf, before in [*made, *self._given]:
            if leaf is not None:
                leaf.grad = before


def _unheld(leaf: torch.Tensor) -> ValueError:
    dtype = str(leaf.dtype).removeprefix("torch.")
    return ValueError(
        "module must hold every tensor that takes a gradient. Got a loss that depends on one of "
        f"shape {tuple(leaf.shape)} and dtype {dtype} that is in no module. "
        "Pass all modules, and the tensors that are in none: module=[first, second, tensor]."
    )
