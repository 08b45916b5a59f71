"""Checks of modules that add up gradients over ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed


def check_reduce(reduce: str | None, known: Sequence[str], kind: str) -> None:
    """Refuses a `reduce` that a kind of module does not have.

    Raises:
        ValueError: `reduce` is not one of the known words.
    """
    if reduce is not None and reduce not in known:
        raise ValueError(
            f"reduce of a {kind} must be {' or '.join(repr(word) for word in known)}. "
            f"Got reduce={reduce!r}. Leave it out for {known[0]!r}. See docs/guides/processes.md."
        )


def check_group(groups: Sequence[Any], given: Any) -> None:
    """Refuses modules that add up over different ranks, or not over the caller's ranks.

    Args:
        groups: process groups of the modules.
        given: a process group, a one-dimensional mesh, or None.

    Raises:
        ValueError: the ranks differ.
    """
    ranks = distributed.get_process_group_ranks(groups[0])
    others = list(groups[1:])
    if given is not None:
        others.append(given.get_group() if hasattr(given, "get_group") else given)
    for other in others:
        found = distributed.get_process_group_ranks(other)
        if found != ranks:
            raise ValueError(
                "All modules of a window must add up gradients over the same ranks. "
                f"Got ranks {ranks} and {found}. Leave group out, and make all with one group."
            )


def check_ddp(module: Any) -> None:
    """Refuses a DistributedDataParallel whose reductions cannot wait for the end of a window.

    Raises:
        ValueError: an option of the module does not allow it, or a layer is refused.
    """
    if module.static_graph:
        raise ValueError(
            "DistributedDataParallel must not have static_graph=True: PyTorch loses the gradients "
            "of its no_sync passes. Got static_graph=True. Leave it out: checkpointing, and "
            "parameters that only some updates use, work without it."
        )
    for option, is_set in (
        ("mixed_precision", module.mixed_precision is not None),
        ("delay_all_reduce_named_params", bool(module._delay_all_reduce_params)),
        ("an optimizer in its backward pass", _steps(module)),
    ):
        if is_set:
            raise ValueError(
                "virtualbatch reduces gradients after the window. Got a DistributedDataParallel "
                f"with {option}. Make it without that option."
            )
    refuse_talking_layers(module)


def refuse_talking_layers(module: torch.nn.Module) -> None:
    """Refuses layers that communicate with other ranks, which may run other micro-batches.

    Raises:
        ValueError: there is such a layer in training mode.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.SyncBatchNorm) and layer.training:
            raise ValueError(
                "A layer that communicates with other ranks must run equally often on all of "
                "them. Got SyncBatchNorm. Use BatchNorm, whose statistics are merged over ranks."
            )


def _steps(module: Any) -> bool:
    parameters = list(module.module.parameters())
    hooks = [getattr(hook, "__name__", "") for hook, _ in module._comm_hooks]
    return any("hook_then_optimizer" in name for name in hooks) or any(
        hasattr(parameter, "_in_backward_optimizers") for parameter in parameters
    )
