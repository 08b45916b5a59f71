"""One update of a trainer: its batches, cut and weighed, and run through the engine's loss."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from virtualbatch.torch._batch import read
from virtualbatch.torch._call import Call
from virtualbatch.torch._deferred import window_loss
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._window import Program
from virtualbatch.transformers._attributes import PlainAttributes
from virtualbatch.transformers._checks import is_of_trl
from virtualbatch.transformers._finder import WeightFinder
from virtualbatch.transformers._metrics import Counted, counted, merge_metrics
from virtualbatch.transformers._rows import rows_of
from virtualbatch.transformers._update import Cut, UpdateRows, rows_of_update
from virtualbatch.transformers._weights import Candidate, candidates, likeliest

_log = logging.getLogger("virtualbatch")

Inputs = Mapping[str, Any]


class UpdateLoss:
    """The loss of an update, with one node behind it for the trainer's own backward pass.

    Args:
        trainer: the trainer.
        compute_loss: its own.
        count: the inputs of a micro-batch -> the number of items that the trainer divides by; None
            if it gives its loss no count.
        cut: how updates are cut.
        weight: as the caller gave it.
        is_pairs: whether a row is a pair.
    """

    def __init__(
        self,
        trainer: Any,
        compute_loss: Callable[..., Any],
        count: Callable[[Inputs], torch.Tensor | None],
        cut: Cut,
        weight: Callable[[Inputs], Any] | None,
        is_pairs: bool,
    ):
        self.trainer = trainer
        self.compute_loss = compute_loss
        self.count = count
        self.is_pairs = is_pairs
        self.is_of_trl = is_of_trl(trainer)
        self._likeliest = likeliest(trainer)
        self._cut = cut
        self._given = None if weight is None else Candidate("weight", weight)
        names = (type(trainer).__name__, type(trainer.model).__name__)
        self._finder = WeightFinder(names, trainer.args.world_size)

    def __call__(self, model: Any, batches: Sequence[Inputs]) -> torch.Tensor:
        """Runs an update.

        Args:
            model: as the trainer has prepared it.
            batches: its inputs, as the trainer has prepared them.

        Returns:
            The mean loss of the whole batch, a scalar.
        """
        trainer = self.trainer
        config = getattr(trainer.model, "config", None)
        is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        rows = rows_of_update(batches, self._cut, self.is_pairs, is_encoder_decoder)
        with self._own_means():
            before = PlainAttributes(trainer)
            update = _Update(self, rows, before)
            tried = update
            if len(batches) > 1 and all(rows_of(x, self.is_pairs) == 1 for x in batches):
                # One row shows nothing: those of all batches are tried together.
                tried = _Update(self, self._together(rows, batches, is_encoder_decoder), before)
            candidate = self._candidate(tried, model)
            update.writes_rows = self._finder.writes_rows
            loss: torch.Tensor = window_loss(
                Call(
                    update.program(model, candidate),
                    rows.batch,
                    self._cut.microbatch_size,
                    None,
                    check=False,
                ),
                scaler=trainer.accelerator.scaler,
            )
            if self.is_of_trl:
                level = getattr(trainer, "importance_sampling_level", None)
                merge_metrics(
                    trainer._metrics["train"],
                    before["_metrics"]["train"],
                    update.ran,
                    is_sum=candidate.is_sum,
                    ratios_are_of_tokens=level == "token",
                )
        return loss

    def _candidate(self, update: "_Update", model: Any) -> Candidate:
        """What the loss was divided by."""
        rows = update.rows
        batch = read(rows.batch, weighted=True)
        if not batch.can_be_cut:
            return self._of_whole_batches(rows)
        # The trial runs on this rank alone.
        alone = model.module if isinstance(model, DistributedDataParallel) else model

        def program_of(candidate: Candidate) -> Program:
            return update.program(alone, candidate)

        size = self._cut.microbatch_size
        cut = (
            batch.given
            if batch.is_window
            else batch.cut(size if isinstance(size, int) else 1, None)
        )
        inputs = rows.inputs(cut[0].get())
        if self._given is None:
            several = candidates(inputs, self.is_pairs, self.count, self._likeliest)
        else:
            several = [self._given]
        try:
            found = self._finder.choose(several, program_of, batch, cut, update.begin)
        except ValueError as error:
            if self._given is None:
                raise
            self._finder.give_up()
            _log.warning(
                "The weight that was given does not fit, and is used all the same. %s", error
            )
            found = self._given
        return found

    def _together(
        self, rows: UpdateRows, batches: Sequence[Inputs], is_encoder_decoder: bool
    ) -> UpdateRows:
        """The rows of all batches in one, where they can be joined; else as they are."""
        if self._cut.is_given or rows.form is None or self._finder.is_decided:
            return rows
        try:
            return rows_of_update(batches, Cut(1, None), self.is_pairs, is_encoder_decoder)
        except ValueError:
            return rows

    def _of_whole_batches(self, rows: UpdateRows) -> Candidate:
        """The same where rows cannot be told apart, and so nothing can be tried."""
        if self._given is not None:
            return self._given
        inputs = rows.inputs(rows.batch[0])
        found = candidates(inputs, self.is_pairs, self.count, self._likeliest)[0]
        if found.weight is not self.count and found.name != self._likeliest:
            raise ValueError(
                "A weight is found by the rows of a batch. Got inputs without common rows, and a "
                "trainer that gives its loss no count of labels. Pass weight=lambda inputs: ..., "
                "what the loss of a micro-batch was divided by."
            )
        return found

    @contextmanager
    def _own_means(self) -> Iterator[None]:
        """The loss of a micro-batch is its own mean: not times the number of ranks."""
        args, steps = self.trainer.args, self.trainer.current_gradient_accumulation_steps
        kept = args.average_tokens_across_devices
        args.average_tokens_across_devices = False
        try:
            yield
        finally:
            args.average_tokens_across_devices = kept
            self.trainer.current_gradient_accumulation_steps = steps


class _Update:
    """The micro-batches of an update, as the engine runs them.

    Args:
        owner: whose update.
        rows: of the update.
        before: what the trainer's loss may change.

    Attributes:
        rows: see above.
        ran: what each micro-batch counts that ran in the last attempt.
        writes_rows: whether the loss changes its rows in place.
    """

    def __init__(self, owner: UpdateLoss, rows: UpdateRows, before: PlainAttributes):
        self.rows = rows
        self.ran: list[Counted] = []
        self.writes_rows = False
        self._owner = owner
        self._before = before
        self._steps = owner.trainer.current_gradient_accumulation_steps

    def begin(self) -> None:
        """Puts back what the trainer's loss changes beside tensors."""
        self.ran.clear()
        self._before.restore()

    def program(self, model: Any, candidate: Candidate) -> Program:
        """What the engine runs.

        Args:
            model: as the trainer has prepared it.
            candidate: what the loss was divided by.
        """
        trainer, owner, weight = self._owner.trainer, self._owner, candidate.weight

        def loss_fn(microbatch: Any) -> torch.Tensor:
            inputs = self.rows.inputs(microbatch)
            if self.writes_rows:
                inputs = {name: _cloned(value) for name, value in inputs.items()}
            if owner.is_of_trl:
                self.ran.append(counted(inputs, weight, owner.count, owner.is_pairs))
            # What is a share of its window already divides by the batches of it.
            trainer.current_gradient_accumulation_steps = self._steps if candidate.is_sum else 1
            with trainer.compute_loss_context_manager():
                loss: torch.Tensor = owner.compute_loss(
                    model, inputs, num_items_in_batch=owner.count(inputs)
                )
            return loss

        def weigh(microbatch: Any) -> Any:
            return weight(self.rows.inputs(microbatch)) if callable(weight) else weight

        found = inventory(model, hands_over=True)
        given: Any = weigh if callable(weight) else weight
        return Program(loss_fn, given, False, None, found, begin=self.begin)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
