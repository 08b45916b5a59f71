"""Modules that add up gradients over processes, and the processes that there are."""

import sys
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def number_of_processes() -> int:
    """Processes of the default group; 1 without one."""
    distributed = torch.distributed
    # A build without it has none of its functions.
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def distributed_classes() -> tuple[type[Any], ...]:
    """Modules that exchange gradients or parameters in their own backward pass."""
    return (
        DistributedDataParallel,
        *classes_of("torch.distributed.fsdp", "FSDPModule", "FullyShardedDataParallel"),
        *classes_of("deepspeed", "DeepSpeedEngine"),
    )


def put_to_rest(module: Any) -> None:
    """Lets a module show its shards, also after a forward pass without a backward pass."""
    if isinstance(module, classes_of("torch.distributed.fsdp", "FSDPModule")):
        module.reshard()


def full(x: torch.Tensor) -> torch.Tensor:
    """A tensor without its mesh, on all ranks of which it is the same."""
    tensors = classes_of("torch.distributed.tensor", "DTensor")
    found: torch.Tensor = x.full_tensor() if isinstance(x, tensors) else x
    return found


def classes_of(module: str, *names: str) -> tuple[type[Any], ...]:
    """Some classes of a module, if somebody has imported it."""
    # Looked up, never imported: it takes more than a second, and whoever has such a module has it.
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))
