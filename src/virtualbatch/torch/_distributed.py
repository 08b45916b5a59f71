"""Modules that add up gradients over processes, and the number of processes."""

import sys
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def number_of_processes() -> int:
    """The number of processes of the default group; 1 without a group."""
    distributed = torch.distributed
    # A build without torch.distributed has only is_available().
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
    """Reshards a module. After a forward pass without a backward pass it is not resharded yet."""
    if isinstance(module, classes_of("torch.distributed.fsdp", "FSDPModule")):
        module.reshard()


def full(x: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a DTensor, the same on all ranks; any other tensor as it is."""
    tensors = classes_of("torch.distributed.tensor", "DTensor")
    found: torch.Tensor = x.full_tensor() if isinstance(x, tensors) else x
    return found


def classes_of(module: str, *names: str) -> tuple[type[Any], ...]:
    """Some classes of a module, if the module is already imported."""
    # Looked up, never imported: an import takes more than a second. Only a program that imported
    # the module can have such objects.
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))
