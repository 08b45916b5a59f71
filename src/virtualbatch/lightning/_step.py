"""The training step of one module: the batches of an update become one window of micro-batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from virtualbatch.lightning._checks import check_trainer
from virtualbatch.lightning._window import Given, MicrobatchLoss, run_window
from virtualbatch.torch._as_written import as_written


class TrainingStep:
    """Replaces the `training_step` of one LightningModule.

    It is an object, not a function. So a copy of the module, such as one that a callback makes to
    average weights, has a copy of this object, which trains the copied module. It can be pickled if
    `weight` can.

    Args:
        module: the module.
        microbatch_size: see `accumulate`.
        weight: see `accumulate`.

    Attributes:
        module: as given.
        before: the `training_step` that was set on the instance, such as a compiled one. None if
            the module used the `training_step` of its class.
    """

    def __init__(self, module: Any, microbatch_size: Any, weight: Any):
        self.module = module
        self.before: Callable[..., Any] | None = vars(module).get("training_step")
        self._loss = MicrobatchLoss(self, microbatch_size, weight)
        # The batches of an update whose last batch is still to come.
        self._collected: list[Given] = []
        # The epoch and the number of the batch that was collected last.
        self._last: tuple[int, int] | None = None
        self._ran_at: int | None = None

    # Lightning reads the signature and the code of a step under this name.
    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own training step."""
        if self.before is not None:
            return self.before
        found: Callable[..., Any] = type(self.module).training_step.__get__(self.module)
        return found

    @as_written
    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Keeps a batch until its update is complete, then runs the update as a window."""
        module, given = self.module, Given(batch, args, kwargs)
        if module.fabric is not None:
            raise ValueError(
                "accumulate works in lightning.Trainer. Got a module in Fabric. "
                "Call restore(module), and fabric.backward(virtualbatch.torch.loss(...))."
            )
        trainer = module._trainer
        # A call from elsewhere, such as validation, gets the user's own step.
        if trainer is None or not trainer.training or not torch.is_grad_enabled():
            return self.__wrapped__(batch, *args, **kwargs)
        check_trainer(trainer.strategy, trainer.callbacks)
        steps = trainer.accumulate_grad_batches
        if steps == 1:
            return self._run([given], steps)
        self._collect(given, trainer.current_epoch, trainer.fit_loop.epoch_loop, steps)
        if trainer.fit_loop._should_accumulate():
            return torch.zeros((), device=module.device, requires_grad=True)
        batches, self._collected = self._collected, []
        return self._run(batches, steps)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the batches of an unfinished update, because a copy has no part in it."""
        return vars(self) | {"_collected": [], "_last": None, "_ran_at": None}

    def _collect(self, given: Given, epoch: int, loop: Any, steps: int) -> None:
        # An epoch or a training may end in the middle of an update. That update is never made.
        follows = self._last in ((epoch, loop.batch_idx), (epoch, loop.batch_idx - 1))
        if not follows or loop.batch_idx % steps == 0:
            self._collected, self._ran_at = [], None
        self._last = epoch, loop.batch_idx
        if loop.total_batch_idx == self._ran_at:
            raise ValueError(
                "With accumulate_grad_batches above 1, an optimizer may call its closure only "
                "once, because Lightning clears gradients at the first batch only. Got a second "
                f"call with accumulate_grad_batches={steps}, as LBFGS makes it. Use "
                "accumulate_grad_batches=1 and a loader with the whole batch."
            )
        self._collected.append(given)
        if not loop._should_accumulate():
            self._ran_at = loop.total_batch_idx

    def _run(self, batches: Sequence[Given], steps: int) -> Any:
        trainer = self.module.trainer
        # The engine refuses to run inside a loop that accumulates by itself.
        trainer.accumulate_grad_batches = 1
        try:
            loss, extra = run_window(self._loss, self.module, batches)
        finally:
            trainer.accumulate_grad_batches = steps
        # Lightning will divide the loss by this number.
        loss = loss * steps if steps > 1 else loss
        return loss if extra is None else {"loss": loss, **extra}


def step_of(module: Any) -> TrainingStep | None:
    """The training step that `accumulate` has set on a module; None if there is none."""
    found = vars(module).get("training_step")
    return found if isinstance(found, TrainingStep) else None
