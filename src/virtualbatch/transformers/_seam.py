"""Where a trainer is changed: attributes of one instance, and nothing of its class."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from virtualbatch.transformers._checks import is_of_pairs
from virtualbatch.transformers._rows import rows_of
from virtualbatch.transformers._update import Asked
from virtualbatch.transformers._window import UpdateLoss

_ATTRIBUTE = "_virtualbatch"


class Seam:
    """Collects the batches of an update, and runs them when the last has come.

    Preparation, callbacks and counters run around each batch as usual. The loss of every batch but
    the last is 0, and the loss of the last is that of the update.

    Args:
        trainer: the trainer.
        asked: how updates are cut and weighed.
    """

    def __init__(self, trainer: Any, asked: Asked):
        self._trainer = trainer
        self._is_pairs = is_of_pairs(trainer)
        # What the instance has, which may be somebody's own already.
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
        # The loss of an update is divided by nothing.
        trainer.loss_is_scaled_for_ga = True
        setattr(trainer, _ATTRIBUTE, self)

    def detach(self) -> None:
        """Leaves the trainer as it was."""
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
            # A stream has ended. Batches without rows let the trainer count to its update, which
            # it would else make with the next batches.
            samples = samples + [_without_rows(samples[0])] * (num_batches - len(samples))
        self._expected = len(samples)
        return samples, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's own, whose loss is that of an update."""
        self._is_in_step, self._calls = True, 0
        try:
            found: torch.Tensor = self._training_step(*args, **kwargs)
        finally:
            self._is_in_step = False
        if not self._calls:
            raise self._refused_calls()
        return found

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own outside of training; in it, the loss of the update or 0."""
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
        # Whoever calls may change the inputs before the update runs.
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
        """The number of items that the trainer divides the loss of a micro-batch by."""
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
    """What `accumulate` has set on a trainer; None if nothing."""
    found: Seam | None = vars(trainer).get(_ATTRIBUTE)
    return found


def _without_rows(inputs: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        return inputs[:0] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {name: _without_rows(value) for name, value in inputs.items()}
    return [] if isinstance(inputs, list) else inputs
