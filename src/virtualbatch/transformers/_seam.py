"""The only changes to a trainer: attributes of one instance, and none of its class."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from virtualbatch.transformers._checks import is_of_pairs
from virtualbatch.transformers._rows import rows_of
from virtualbatch.transformers._update import Asked
from virtualbatch.transformers._window import UpdateLoss

_ATTRIBUTE = "_virtualbatch"


class Seam:
    """Collects the batches of an update, and runs them when the last one has come.

    Preparation, callbacks and counters run around each batch as usual. The last batch returns the
    loss of the update. Every batch before returns a loss of 0.

    Args:
        trainer: the trainer.
        asked: the options of `accumulate`.
    """

    def __init__(self, trainer: Any, asked: Asked):
        self._trainer = trainer
        self._is_pairs = is_of_pairs(trainer)
        # These may be attributes that the user has set on the instance.
        self._training_step = trainer.training_step
        self._compute_loss = trainer.compute_loss
        self._get_batch_samples = trainer.get_batch_samples
        self._before = {
            name: vars(trainer)[name] for name in self._names() if name in vars(trainer)
        }
        self._loss = UpdateLoss(trainer, trainer.compute_loss, self._count, asked, self._is_pairs)
        self._is_in_step = False
        self._is_running = False
        self._calls = 0
        self._collected: list[Any] = []
        self._expected = 0

    @staticmethod
    def _names() -> tuple[str, ...]:
        return ("training_step", "compute_loss", "get_batch_samples", "loss_is_scaled_for_ga")

    def attach(self) -> None:
        """Sets the attributes."""
        trainer = self._trainer
        trainer.training_step = self.training_step
        trainer.compute_loss = self.compute_loss
        trainer.get_batch_samples = self.get_batch_samples
        # The trainer must not divide the loss of an update.
        trainer.loss_is_scaled_for_ga = True
        setattr(trainer, _ATTRIBUTE, self)

    def detach(self) -> None:
        """Removes the attributes, and puts back those that the instance had before."""
        attributes = vars(self._trainer)
        for name in (*self._names(), _ATTRIBUTE):
            attributes.pop(name, None)
        attributes.update(self._before)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of the next update, and the trainer's count of their items."""
        samples, items = self._get_batch_samples(epoch_iterator, num_batches, device)
        self._collected = []
        if samples and len(samples) < num_batches:
            # The data has ended. Batches without rows let the trainer count to its update.
            # Otherwise it would make the update together with later batches.
            samples = samples + [_without_rows(samples[0])] * (num_batches - len(samples))
        self._expected = len(samples)
        return samples, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's own training step, with our `compute_loss` inside."""
        self._is_in_step, self._calls = True, 0
        try:
            found: torch.Tensor = self._training_step(*args, **kwargs)
        finally:
            self._is_in_step = False
        if not self._calls:
            raise self._refused_calls()
        return found

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """In a training step the loss of the update, or 0. Elsewhere the trainer's own loss."""
        if self._is_running or not self._is_in_step:
            return self._compute_loss(model, inputs, *args, **kwargs)
        self._calls += 1
        if self._calls > 1 or kwargs.get("return_outputs", any(args[:1])):
            raise self._refused_calls()
        if not isinstance(inputs, Mapping):
            raise TypeError(
                "The inputs of a trainer must have names. "
                f"Got a {type(inputs).__name__} in {type(self._trainer).__name__}. "
                "Return a dict from the data collator."
            )
        # Copy, because the caller may change the inputs before the update runs.
        self._collected.append(dict(inputs))
        is_last = len(self._collected) == self._expected
        if self._trainer.accelerator.sync_gradients != is_last:
            raise ValueError(
                "The batches of an update must be known when it begins. "
                f"Got one that does not end after {self._expected} batches: "
                "gradient_accumulation_steps was changed within an epoch. "
                "Change it in on_epoch_begin."
            )
        if not is_last:
            return torch.zeros((), device=self._trainer.args.device, requires_grad=True)
        batches = [each for each in self._collected if rows_of(each, self._is_pairs)]
        self._collected = []
        self._is_running = True
        try:
            return self._loss(model, batches)
        finally:
            self._is_running = False

    def _count(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """The number of items by which the trainer divides a micro-batch's loss; None if none."""
        device = self._trainer.args.device
        found: torch.Tensor | None = self._get_batch_samples(iter([inputs]), 1, device)[1]
        return found

    def _refused_calls(self) -> ValueError:
        return ValueError(
            f"A training_step must call compute_loss once, for its loss alone. Got {self._calls} "
            f"calls, or one with return_outputs=True, in {type(self._trainer).__name__}. Call "
            "virtualbatch.torch.loss in training_step yourself."
        )


def seam_of(trainer: Any) -> Seam | None:
    """The `Seam` that `accumulate` has set on a trainer; None if there is none."""
    found: Seam | None = vars(trainer).get(_ATTRIBUTE)
    return found


def _without_rows(inputs: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        return inputs[:0] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {name: _without_rows(value) for name, value in inputs.items()}
    return [] if isinstance(inputs, list) else inputs
