"""Hooks that step an optimizer in the backward pass, which has many of them in one window."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

_VERSION = torch.Tensor._version.__get__

# Owner of parameters -> the parameters whose nodes were looked at. Making a node takes longer than
# all else that is asked of a parameter, so each window only sees whether they are the same ones.
_LOOKED: Any = WeakIdKeyDictionary()


def refuse_node_hooks(owner: Any, parameters: Mapping[int, torch.Tensor]) -> None:
    """Refuses hooks on the nodes that add to `.grad`, the first time that it sees the parameters.

    Hooks that are added later change a parameter in a backward pass, see
    `refuse_changed_parameters`.

    Args:
        owner: lives as long as the parameters are trained.
        parameters: those that take a gradient, by identity.

    Raises:
        ValueError: there is one.
    """
    given = list(parameters)
    if _LOOKED.get(owner) == given:
        return
    for parameter in parameters.values():
        # A node lives as long as somebody holds it, and whoever hooked it does. It does not list
        # its hooks; the handle of one more has all of them.
        node = get_gradient_edge(parameter).node
        handle = node.register_hook(_nothing)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            raise _steps("a hook on the AccumulateGrad node of one", parameter)
    _LOOKED[owner] = given


def versions(parameters: Sequence[torch.Tensor]) -> list[int]:
    """How often each parameter was changed in place."""
    return list(map(_VERSION, parameters))


def refuse_changed_parameters(parameters: Sequence[torch.Tensor], before: list[int]) -> None:
    """Refuses a backward pass that changed a parameter.

    Args:
        parameters: tensors.
        before: their versions before the backward pass.

    Raises:
        ValueError: one of them has another version.
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
        "A parameter must stay as it is until the window has ended, or an optimizer in the "
        f"backward pass would step at every micro-batch. Got {got} of shape "
        f"{tuple(parameter.shape)}. Remove the hook, and step after the call."
    )
