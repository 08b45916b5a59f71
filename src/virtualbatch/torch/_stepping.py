"""Refuses hooks that step an optimizer in a backward pass: a window has several of these passes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

from virtualbatch.torch._undo import Undo
from virtualbatch.torch._unhook import unhook

_VERSION = torch.Tensor._version.__get__

# Owner -> the parameters whose nodes were checked, and the places of those with hooks. To make a
# node takes longer than all other checks of a parameter, so nodes are made only for new parameters.
_LOOKED: Any = WeakIdKeyDictionary()


def node_hooks(
    owner: Any, parameters: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, dict[int, Any]]]:
    """The parameters that have hooks on the node that adds to `.grad`, and these hooks.

    Hooks that are added later are not found. `refuse_changed_parameters` detects them, because
    they change a parameter in a backward pass.

    Args:
        owner: an object that lives as long as the parameters are trained.
        parameters: the parameters that take a gradient.

    Returns:
        (parameter, its hooks). The hooks are in the dictionary that PyTorch itself uses.
    """
    given = list(map(id, parameters))
    known, hooked = _LOOKED.get(owner, (None, ()))
    places = hooked if known == given else range(len(parameters))
    found = [(k, hooks) for k in places if (hooks := _hooks(parameters[k]))]
    # Places are kept, not hooks: a hook may refer to the owner and would keep it alive.
    _LOOKED[owner] = given, [k for k, _ in found]
    return [(parameters[k], hooks) for k, hooks in found]


def _hooks(parameter: torch.Tensor) -> dict[int, Any]:
    """The hooks of the node that adds to a parameter's `.grad`."""
    # A node lives as long as code holds it, and code that added a hook must hold it. The node does
    # not list its hooks, but the handle of one more hook has all of them.
    node = get_gradient_edge(parameter).node
    with Undo(partial(_forget, node)):
        return _hooks_with_one_more(node)


def _hooks_with_one_more(node: Any) -> dict[int, Any]:
    hooks: dict[int, Any] = node.register_hook(_nothing).hooks_dict_ref()
    return hooks


def _forget(node: Any) -> None:
    unhook(_nothing, _hooks_with_one_more(node))


def refuse_node_hooks(owner: Any, parameters: Sequence[torch.Tensor]) -> None:
    """Refuses hooks on the nodes that add to `.grad`.

    Args:
        owner: an object that lives as long as the parameters are trained.
        parameters: the parameters that take a gradient.

    Raises:
        ValueError: there is such a hook.
    """
    for parameter, _ in node_hooks(owner, parameters):
        raise _steps("a hook on the AccumulateGrad node of one", parameter)


def versions(parameters: Sequence[torch.Tensor]) -> list[int]:
    """How often each parameter was changed in place."""
    return list(map(_VERSION, parameters))


def refuse_changed_parameters(parameters: Sequence[torch.Tensor], before: list[int]) -> None:
    """Refuses a backward pass that changed a parameter.

    Args:
        parameters: tensors.
        before: their versions before the backward pass.

    Raises:
        ValueError: a parameter has another version.
    """
    now = versions(parameters)
    if now == before:
        return
    changed = (p for p, a, b in zip(parameters, before, now, strict=True) if a != b)
    raise _steps("a backward pass that changed one", next(changed))


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


def _steps(got: str, parameter: torch.Tensor) -> ValueError:
    return ValueError(
        "A parameter must not change before the window ends: an optimizer in the backward pass "
        f"would step at every micro-batch. Got {got} of shape {tuple(parameter.shape)}. Remove "
        "the hook, and step after the call."
    )
