"""Which processes share a window: this process alone, or the ranks of a module."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from virtualbatch.torch._distributed import classes_of, number_of_processes
from virtualbatch.torch._modules import Inventory
from virtualbatch.torch._replicas.replicas import Replicas


def replicas_of(found: Inventory, group: Any, reduce: str | None) -> Replicas | None:
    """The replicas that share a window; None if this process runs it alone.

    Args:
        found: what the modules of the window hold.
        group: as the caller gave it.
        reduce: as the caller gave it.

    Raises:
        ValueError: there are several processes, and no module adds up their gradients.
        ValueError: `group` or `reduce` does not fit the modules.
        ValueError: a module cannot be used.
    """
    if not found.distributed:
        _check_alone(found, group, reduce)
        return None
    _refuse_others(found)
    if group is False:
        raise ValueError(
            "group=False is for ranks that train apart. Got it with "
            f"{type(found.distributed[0]).__name__}, which adds up their gradients. Pass the "
            "module inside it, or leave group out."
        )
    if all(isinstance(module, DistributedDataParallel) for module in found.distributed):
        # Imported here, so that a process without other ranks does not import it.
        from virtualbatch.torch._replicas.ddp import Replicated

        return Replicated(found, group, reduce)
    from virtualbatch.torch._replicas.fsdp import Sharded

    return Sharded(found, group, reduce)


def quiet(found: Inventory) -> AbstractContextManager[None]:
    """A context in which this rank runs micro-batches without the others, as planning does."""
    refuse_in_step(found)
    replicas = replicas_of(found, None, None) if found.distributed else None
    return nullcontext() if replicas is None else replicas.alone()


def refuse_in_step(found: Inventory) -> None:
    """Refuses modules that one rank cannot run without the others.

    Raises:
        ValueError: there is such a module.
    """
    for module in found.distributed:
        if isinstance(module, classes_of("torch.distributed.fsdp", "FSDPModule")):
            raise ValueError(
                'plan and microbatch_size="auto" measure one device. Got '
                f"{type(module).__name__}, whose ranks run together. Call plan with the module "
                "before it is sharded, and pass what it finds."
            )


def refuse_replicas(found: Inventory) -> None:
    """Refuses modules that add up gradients over ranks.

    Raises:
        ValueError: there is such a module.
    """
    for module in found.distributed:
        raise ValueError(
            "certify compares on one process. "
            f"Got a {type(module).__name__}. Pass the module inside it, such as ddp.module, and "
            "this rank's batch."
        )


def _check_alone(found: Inventory, group: Any, reduce: str | None) -> None:
    if reduce is not None:
        raise ValueError(
            f"reduce is for modules that add up gradients over ranks. Got reduce={reduce!r} and "
            "no such module. Leave it out."
        )
    if group is not None and group is not False:
        raise adds_nothing_up(type(found.roots[0]).__name__, f"group={type(group).__name__}")
    processes = number_of_processes()
    if processes == 1 or group is False or not torch.is_grad_enabled():
        return
    # With tensor parallelism, ranks have the same rows, so no gradients are added up.
    tensors = classes_of("torch.distributed.tensor", "DTensor")
    if not any(isinstance(parameter, tensors) for parameter in found.parameters):
        raise adds_nothing_up(
            type(found.roots[0]).__name__, f"a process group of {processes} ranks"
        )


def adds_nothing_up(what: str, where: str) -> ValueError:
    """The error for gradients that would not be added up over ranks.

    Args:
        what: the module or parameter, in words.
        where: the sign that there are other ranks, in words.
    """
    return ValueError(
        f"module must be the wrapper that adds up gradients over ranks. Got {what} in {where}. "
        "Pass the DistributedDataParallel around it, such as trainer.strategy.model in Lightning, "
        "or group=False if the ranks train apart. See docs/guides/processes.md."
    )


def _refuse_others(found: Inventory) -> None:
    for module in found.distributed:
        if isinstance(module, classes_of("torch.distributed.fsdp", "FullyShardedDataParallel")):
            raise ValueError(
                "FullyShardedDataParallel of the first kind is not supported. "
                f"Got {type(module).__name__} as module. Use torch.distributed.fsdp.fully_shard."
            )
        if isinstance(module, classes_of("deepspeed", "DeepSpeedEngine")):
            raise ValueError(
                "DeepSpeed reduces and accumulates by itself. "
                f"Got {type(module).__name__} as module. Use DDP or fully_shard."
            )
    kinds = {isinstance(module, DistributedDataParallel) for module in found.distributed}
    if len(kinds) > 1:
        names = " and ".join(sorted({type(module).__name__ for module in found.distributed}))
        raise ValueError(
            "All modules of a window must add up gradients in the same way. "
            f"Got {names}. Use DDP or fully_shard for all of them."
        )
