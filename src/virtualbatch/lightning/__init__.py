"""Gradient accumulation inside the Lightning Trainer, exact: one line for one module.

`accumulate` gives one LightningModule a `training_step` that runs what Lightning calls an update
as one window of micro-batches; the Trainer, its strategy, callbacks and loggers stay as they are.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from virtualbatch.lightning._checks import check_module, check_version, check_weight
from virtualbatch.lightning._step import TrainingStep, step_of
from virtualbatch.plan.auto import Auto, check_sizes_or_auto

__all__ = ["accumulate", "restore"]


def __dir__() -> list[str]:
    """What is public: completion shows no other names."""
    return __all__


Module = TypeVar("Module", bound=LightningModule)


def accumulate(
    module: Module,
    *,
    microbatch_size: int | str | Auto | None = None,
    weight: Callable[[Any], Any] | str | None = None,
) -> Module:
    """Makes every update of a Lightning Trainer that of its whole batch, run in micro-batches.

    The batch of an update is what the Trainer is told: one batch of the loader, or those that
    `accumulate_grad_batches` or a `GradientAccumulationScheduler` collect. Call it once, before
    `fit`. What `training_step` logs and returns is put together for the whole batch, and if memory
    runs out the same update runs again in smaller pieces. Checkpoints do not know of it.

    Args:
        module: with automatic optimization. With manual optimization, and in Fabric, use
            `virtualbatch.torch.loss`.
        microbatch_size: rows of one forward and backward pass, by which each batch of the loader
            is cut; or "auto" or an `Auto`, which plan it at the first update; None for the batches
            of the loader as they are.
        weight: micro-batch -> what its mean loss was divided by, a scalar >= 0, such as the number
            of its tokens (rows when None); or "sum" for a loss that is a sum. It gets a batch as
            `training_step` does.

    Returns:
        The module.

    Raises:
        TypeError: `module` is not a LightningModule, or `weight` is not a function.
        ValueError: the module accumulates already, optimizes by itself or reads the loader, or a
            size is not a positive integer. At the first update: the strategy adds gradients up in
            its own way, or micro-batches of this loss do not add up to their batch.
        RuntimeError: this release of Lightning is not served.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module = accumulate(BoringModel(), microbatch_size=32)
        >>> module = restore(module)
    """
    check_version()
    check_module(module)
    if step_of(module) is not None:
        raise ValueError(
            "accumulate is called once for a module. "
            f"Got {type(module).__name__}, which accumulates already. Call restore(module) first."
        )
    if microbatch_size is not None:
        check_sizes_or_auto(microbatch_size, None)
    check_weight(weight)
    module.training_step = TrainingStep(module, microbatch_size, weight)
    return module


def restore(module: Module) -> Module:
    """Takes back what `accumulate` did, so that the module is plain Lightning again.

    Does nothing to a module that does not accumulate. Weights stay.

    Args:
        module: a LightningModule.

    Returns:
        The module.
    """
    step = step_of(module)
    if step is not None:
        del module.training_step
        if step.before is not None:
            module.training_step = step.before
    return module
