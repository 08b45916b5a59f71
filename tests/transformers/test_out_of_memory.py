"""An update that runs out of memory: it runs again in smaller pieces, and nothing counts twice."""

from collections import defaultdict, deque

import pytest
import torch
from tests.transformers.training import error, rows_of, run, trained, trainer_of, weights_of
from transformers import Trainer

import virtualbatch
from virtualbatch.transformers import accumulate

ROWS = rows_of("tokens", 24)
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Counting(Trainer):
    """Keeps in its loss whatever users keep there."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.losses = []
        self.rows = self.losses_by_phase = None
        self.last = deque(maxlen=3)
        self.by_name = defaultdict(list)
        self.nested = {"train": {"calls": 0, "tensors": []}}
        self.total = torch.zeros(())
        self.totals = {"loss": torch.zeros(())}
        self.seen_by_others = self.losses

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        rows = len(inputs["input_ids"])
        self.calls += 1
        self.losses.append(loss.item())
        self.last.append(rows)
        self.by_name["rows"].append(rows)
        self.by_name["first tokens"] += inputs["input_ids"][:, 0].tolist()
        self.nested["train"]["calls"] += 1
        self.nested["train"]["tensors"].append(loss.detach())
        self.total += rows
        self.totals["loss"] += rows
        self.newest = rows
        self.log({"rows": rows})
        return loss

    def kept(self):
        """All of it, as plain values."""
        return {
            "calls": self.calls,
            "losses": list(self.losses),
            "seen by others": self.seen_by_others is self.losses,
            "last": list(self.last),
            "by name": dict(self.by_name),
            "nested": self.nested["train"]["calls"],
            "tensors": [x.item() for x in self.nested["train"]["tensors"]],
            "total": self.total.item(),
            "totals": self.totals["loss"].item(),
            "newest": getattr(self, "newest", None),
            "logged": [log["rows"] for log in self.state.log_history if "rows" in log],
        }


class Fails:
    """Memory runs out for more than some rows, from a training call of the model on.

    Args:
        model: what is called.
        where: "forward" or "backward".
        most: rows that fit.
        first: the first call in training mode that fails, counted from 0.

    Attributes:
        rows: of each call in training mode.
    """

    def __init__(self, model, where, most, first):
        self.rows = []
        self._where, self._most, self._first = where, most, first
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def stop(self):
        """Lets all fit."""
        for hook in self._hooks:
            hook.remove()

    def _fails(self, where):
        return where == self._where and self.rows[-1] > self._most and len(self.rows) > self._first

    def _before(self, model, args, kwargs):
        if model.training:
            self.rows.append(len(kwargs["input_ids"]))
            if self._fails("forward"):
                raise torch.OutOfMemoryError(MESSAGE)

    def _after(self, model, args, kwargs, outputs):
        if model.training and self._fails("backward"):
            outputs.loss.register_hook(self._raise)

    def _raise(self, gradient):
        raise torch.OutOfMemoryError(MESSAGE)


def updates(microbatch_size, batch=12, steps=1):
    """A trainer of two updates of 12 rows."""
    trainer = trainer_of("masked", batch, steps, cls=Counting, rows=ROWS, num_train_epochs=1)
    return accumulate(trainer, microbatch_size=microbatch_size)


@pytest.fixture(scope="module")
def uncut():
    """The trainer alone, on whole batches."""
    return run("masked", 12, 1, cls=Counting, rows=ROWS, num_train_epochs=1)


def first_tokens(uncut):
    """Those of all rows, in the order of the trainer alone."""
    return uncut.trainer.by_name["first tokens"]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_update_runs_again_in_smaller_pieces_and_nothing_counts_twice(where, uncut):
    trainer = updates(6)
    # The first window passes. The second micro-batch of the second fails.
    fails = Fails(trainer.model, where, most=3, first=3)
    found = trained(trainer)
    assert fails.rows == [6, 6, 6, 6, 3, 3, 3, 3]
    kept = trainer.kept()
    assert kept["calls"] == kept["nested"] == 6
    assert kept["by name"] == {"rows": [6, 6, 3, 3, 3, 3], "first tokens": first_tokens(uncut)}
    assert kept["logged"] == [6, 6, 3, 3, 3, 3]
    assert kept["total"] == kept["totals"] == 24
    assert kept["last"] == [3, 3, 3]
    assert kept["newest"] == 3
    assert kept["losses"] == kept["tensors"]
    assert len(kept["losses"]) == 6
    assert kept["seen by others"]
    assert trainer.state.global_step == 2
    assert error(found, uncut) < 1e-11
    assert found.losses == pytest.approx(uncut.losses, rel=1e-12)


def test_a_smaller_size_is_kept():
    trainer = updates(6)
    # Memory runs out in the first window, and would again.
    fails = Fails(trainer.model, "forward", most=3, first=0)
    trainer.train()
    assert fails.rows == [6, 3, 3, 3, 3, 3, 3, 3, 3]
    assert trainer.kept()["calls"] == 8


def test_the_trainers_own_batches_are_cut_where_they_do_not_fit(uncut):
    trainer = updates(None, batch=6, steps=2)
    fails = Fails(trainer.model, "backward", most=3, first=2)
    found = trained(trainer)
    assert fails.rows == [6, 6, 6, 3, 3, 3, 3]
    assert trainer.kept()["calls"] == 6
    assert error(found, uncut) < 1e-11


@pytest.mark.parametrize("steps", [1, 3])
def test_a_row_that_does_not_fit_is_told_and_the_trainer_trains_on(steps, uncut):
    trainer = updates(None if steps > 1 else 4, batch=12 // steps, steps=steps)
    before, kept = weights_of(trainer.model), trainer.kept()
    fails = Fails(trainer.model, "backward", most=0, first=0)
    with pytest.raises(MemoryError, match="one row"):
        trainer.train()
    assert fails.rows == [4, 2, 1]
    assert torch.equal(weights_of(trainer.model), before)
    assert trainer.kept() == kept
    assert trainer.state.global_step == 0
    fails.stop()
    assert error(trained(trainer), uncut) < 1e-11
    assert trainer.state.global_step == 2


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize("automatic", ["auto", "limit"])
def test_planning_leaves_no_trace(automatic, uncut):
    size = "auto" if automatic == "auto" else virtualbatch.Auto(memory_limit="1 MiB")
    trainer = updates(size)
    found = trained(trainer)
    kept = trainer.kept()
    # The sizes of both updates are the same, and each row was counted once.
    assert kept["total"] == kept["totals"] == sum(kept["by name"]["rows"]) == 24
    assert automatic == "auto" or max(kept["by name"]["rows"]) < 12
    assert kept["calls"] == kept["nested"] == len(kept["losses"]) == len(kept["tensors"])
    assert kept["logged"] == kept["by name"]["rows"]
    assert trainer.state.global_step == 2
    assert kept["by name"]["first tokens"] == first_tokens(uncut)
    assert error(found, uncut) < 1e-11
    assert found.losses == pytest.approx(uncut.losses, rel=1e-12)
