"""One update of a trainer: its batches, cut and weighed, and run through the engine's loss."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from virtualbatch.torch._accumulator import rounding_seed
from virtualbatch.torch._batch import read
from virtualbatch.torch._call import Call
from virtualbatch.torch._deferred import window_loss
from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._window import Program
from virtualbatch.transformers._attributes import PlainAttributes
from virtualbatch.transformers._checks import is_of_trl
from virtualbatch.transformers._finder import WeightFinder, unlike
from virtualbatch.transformers._metrics import Counted, counted, merge_metrics
from virtualbatch.transformers._update import Asked, UpdateRows, rows_of_update, with_enough_rows
from virtualbatch.transformers._weights import Candidate, candidates, likeliest

_log = logging.getLogger("virtualbatch")

Inputs = Mapping[str, Any]


class UpdateLoss:
    """Computes the loss of an update, with one graph node for the trainer's own backward pass.

    Args:
        trainer: the trainer.
        compute_loss: the trainer's own `compute_loss`.
        count: the inputs of a micro-batch -> the count that the trainer passes to its loss, or
            None.
        asked: the options of `accumulate`.
        is_pairs: whether a row is a pair.
    """

    def __init__(
        self,
        trainer: Any,
        compute_loss: Callable[..., Any],
        count: Callable[[Inputs], torch.Tensor | None],
        asked: Asked,
        is_pairs: bool,
    ):
        self.trainer = trainer
        self.compute_loss = compute_loss
        self.count = count
        self.is_pairs = is_pairs
        self.is_of_trl = is_of_trl(trainer)
        self._likeliest = likeliest(trainer)
        self._asked = asked
        self._given = None if asked.weight is None else Candidate("weight", asked.weight)
        names = (type(trainer).__name__, type(trainer.model).__name__)
        self._finder = WeightFinder(names, trainer.args.world_size)

    def __call__(self, model: Any, batches: Sequence[Inputs]) -> torch.Tensor:
        """Runs an update.

        Args:
            model: the model, as the trainer has prepared it.
            batches: the inputs of its batches, as the trainer has prepared them.

        Returns:
            The mean loss of the whole batch, a scalar.
        """
        trainer = self.trainer
        rows = rows_of_update(batches, self._asked, self.is_pairs, trainer.model)
        with self._own_means():
            update = _Update(self, rows)
            try:
                loss: torch.Tensor = self._run(update, model)
            except BaseException:
                update.put_back()
                raise
        return loss

    def _run(self, update: "_Update", model: Any) -> Any:
        """Finds the weight of the loss, then runs the update."""
        candidate = self._candidate(update, model)
        program = update.program(model, candidate)
        seed = rounding_seed(self._asked.accumulator_dtype, program.found)
        program = program._replace(rounding_seed=seed)
        size = self._asked.microbatch_size
        call = Call(program, update.rows.batch, size, None, check=False)
        loss = window_loss(call, scaler=self.trainer.accelerator.scaler)
        update.merge_metrics(is_sum=candidate.is_sum)
        return loss

    def _candidate(self, update: "_Update", model: Any) -> Candidate:
        """Finds what the loss was divided by."""
        self._finder.begin()
        rows = update.rows
        batch = read(rows.batch, weighted=True)
        size = self._asked.microbatch_size
        cut: Sequence[Microbatch] = []
        if batch.can_be_cut:
            is_even = not batch.is_window
            cut = batch.cut(size if isinstance(size, int) else 1, None) if is_even else batch.given
        inputs = rows.inputs(batch.given[0].get())
        several = candidates(inputs, self.is_pairs, self.count, self._likeliest)
        if self._given is not None:
            several = [self._given]
        if cut and not self._finder.is_decided:
            apart = unlike([update.program(model, each) for each in several], cut)
            batch = with_enough_rows(batch, rows.form, apart)
        try:
            found = self._finder.choose(
                several, partial(update.program, model), batch, cut, update.put_back
            )
        except ValueError as error:
            if self._given is None:
                raise
            self._finder.give_up()
            _log.warning(
                "The weight that was passed does not fit the loss, and is used all the same. %s",
                error,
            )
            found = self._given
        update.writes_rows = self._finder.writes_rows
        return self._untried(several[0]) if found is None else found

    def _untried(self, likeliest: Candidate) -> Candidate:
        """The weight for a window without known rows, on which nothing can be tried.

        Raises:
            ValueError: no weight was passed, and the likeliest is only a guess.
        """
        is_known = likeliest.weight is self.count or likeliest.name == self._likeliest
        if self._given is None and not is_known:
            raise ValueError(
                "A weight is found from the rows of a batch. Got inputs without common rows, and "
                "a trainer that gives its loss no count of labels. Pass weight=lambda inputs: "
                "..., what the loss of a micro-batch was divided by."
            )
        return likeliest

    @contextmanager
    def _own_means(self) -> Iterator[None]:
        """Makes the trainer's loss the plain mean of a micro-batch, not times the ranks."""
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
        owner: the loss that runs the update.
        rows: the rows of the update.

    Attributes:
        rows: as given.
        ran: the counts of each micro-batch that ran in the last attempt.
        writes_rows: whether the loss changes its rows in place.
    """

    def __init__(self, owner: UpdateLoss, rows: UpdateRows):
        self.rows = rows
        self.ran: list[Counted] = []
        self.writes_rows = False
        self._owner = owner
        self._before = PlainAttributes(owner.trainer, nested=True)
        # A loss may call `log`, which adds entries here. It does not change existing entries.
        self._state = PlainAttributes(owner.trainer.state, nested=False)
        self._steps = owner.trainer.current_gradient_accumulation_steps

    def put_back(self) -> None:
        """Puts back what the trainer's loss changes beside its model."""
        self.ran.clear()
        self._before.restore()
        self._state.restore()

    def merge_metrics(self, *, is_sum: bool) -> None:
        """Makes a window that has run count as one call in TRL's metrics.

        Args:
            is_sum: whether losses of micro-batches add up.
        """
        if not self._owner.is_of_trl:
            return
        trainer = self._owner.trainer
        level = getattr(trainer, "importance_sampling_level", None)
        merge_metrics(
            trainer._metrics["train"],
            self._before,
            self.ran,
            is_sum=is_sum,
            ratios_are_of_tokens=level == "token",
        )

    def program(self, model: Any, candidate: Candidate) -> Program:
        """The program that the engine runs.

        Args:
            model: the model, as the trainer has prepared it.
            candidate: what the loss was divided by.
        """
        trainer, owner, weight = self._owner.trainer, self._owner, candidate.weight

        def loss_fn(microbatch: Any) -> torch.Tensor:
            inputs = self.rows.inputs(microbatch)
            if self.writes_rows:
                inputs = {name: _cloned(value) for name, value in inputs.items()}
            if owner.is_of_trl:
                self.ran.append(counted(inputs, weight, owner.count, owner.is_pairs))
            # A loss that is a share of its window divides by the number of batches itself.
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
        return Program(loss_fn, given, False, None, found, begin=self.put_back)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
