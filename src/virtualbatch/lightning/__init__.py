"""Gradient accumulation inside the Lightning Trainer, exact: one line for one module.

`accumulate` gives one LightningModule a `training_step` that runs the batches of one update as one
window of micro-batches. The Trainer, its strategy, callbacks and loggers stay as they are.
"""

from typing import Literal, TypeVar

from lightning.pytorch import LightningModule

from virtualbatch.lightning._checks import check_module, check_version, check_weight
from virtualbatch.lightning._step import TrainingStep, step_of
from virtualbatch.plan.auto import Auto, check_sizes_or_auto
from virtualbatch.window.terms import GivenWeight

__all__ = ["accumulate", "restore"]


def __dir__() -> list[str]:
    """The public names, so that completion shows no others."""
    return __all__


Module = TypeVar("Module", bound=LightningModule)


def accumulate(
    module: Module,
    *,
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    weight: GivenWeight = None,
) -> Module:
    """Makes each update of a Lightning Trainer that of its whole batch, run in micro-batches.

    Call it once, before `fit`. The whole batch is what the Trainer collects for one update: one
    batch of the loader, or the batches of `accumulate_grad_batches` or a
    `GradientAccumulationScheduler`. What `training_step` logs and returns is merged for the whole
    batch. If memory runs out, the update runs again in smaller micro-batches. Checkpoints do not
    contain the change.

    Args:
        module: a module with automatic optimization. With manual optimization, and in Fabric, use
            `virtualbatch.torch.loss` instead.
        microbatch_size: the rows of one forward and backward. Each batch of the loader is cut by
            it. `"auto"` or an `Auto` plans the size at the first update. None keeps the batches of
            the loader as micro-batches.
        weight: what the mean loss of a micro-batch was divided by. None means its rows. `"sum"`
            means that the loss is a sum. Otherwise a function of a batch, in the form that
            `training_step` gets, that returns a number `>= 0`, such as the number of its tokens.

    Returns:
        The module.

    Raises:
        TypeError: `module` is not a LightningModule, or `weight` is not a function.
        ValueError: the module accumulates already, uses manual optimization, or reads the loader.
        ValueError: a size is not a positive integer.
        ValueError: at the first update: the strategy adds gradients up in its own way, or the
            gradients of micro-batches do not add up.
        RuntimeError: this release of Lightning is not supported.

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
