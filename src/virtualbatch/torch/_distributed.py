"""Training by several processes, which this version refuses: it sums no weights over them."""

import sys
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def refuse_several_processes() -> None:
    """Refuses a window in one of several processes, each of which has rows of its own.

    Raises:
        NotImplementedError: the default process group has more than one process.
    """
    distributed = torch.distributed
    # A build without it has none of its functions.
    if not distributed.is_available() or not distributed.is_initialized():
        return
    processes = distributed.get_world_size()
    if processes > 1:
        raise NotImplementedError(
            "A window must be the work of one process in this version, which sums no weights "
            f"over processes. Got a torch.distributed process group of {processes} processes. "
            "Train in one process, or accumulate without virtualbatch."
        )


def distributed_classes() -> tuple[type[Any], ...]:
    """Modules that exchange gradients or parameters in their own backward pass."""
    # Looked up, never imported: it takes more than a second, and whoever has such a module has it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    names = ("FSDPModule", "FullyShardedDataParallel")
    return DistributedDataParallel, *(getattr(fsdp, name) for name in names if hasattr(fsdp, name))


def no_distributed_module(module: torch.nn.Module) -> NotImplementedError:
    """What is raised for a module of such a class."""
    kind = "DistributedDataParallel" if isinstance(module, DistributedDataParallel) else "FSDP"
    return NotImplementedError(
        f"{kind} is not supported by this version, which sums no weights over replicas. "
        f"Got module of type {type(module).__name__}. "
        "Train on one device, or accumulate without virtualbatch."
    )
