"""An update that runs out of memory: it runs again in smaller pieces, and nothing counts twice."""

from collections import defaultdict, deque

import pytest
import torch
from tests.transformers.training import error, run, trained, trainer_of
from transformers import Trainer

import virtualbatch
from virtualbatch.transformers import accumulate

ROWS = 24
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
            "newest": self.newest,
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
        self._model, self._where, self._most, self._first = model, where, most, first
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True)

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


def updates(microbatch_size, cls=Counting, **more):
    """A trainer of two updates of 12 rows."""
    given = {"num_train_epochs": 1, **more}
    trainer = trainer_of("masked", 12, 1, cls=cls, rows=ROWS_OF_ALL, **given)
    return accumulate(trainer, microbatch_size=microbatch_size)


from tests.transformers.training import rows_of  # noqa: E402

ROWS_OF_ALL = rows_of("tokens", ROWS)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_update_runs_again_in_smaller_pieces_and_nothing_counts_twice(where):
    trainer = updates(6)
    # The first window passes. The second micro-batch of the second fails.
    fails = Fails(trainer.model, where, most=3, first=3)
    found = trained(trainer)
    assert fails.rows == [6, 6, 6, 6, 3, 3, 3, 3]
    kept = trainer.kept()
    assert kept["calls"] == kept["nested"] == 6
    assert kept["by name"] == {"rows": [6, 6, 3, 3, 3, 3]}
    assert kept["logged"] == [6, 6, 3, 3, 3, 3]
    assert kept["total"] == kept["totals"] == ROWS
    assert kept["last"] == [3, 3, 3]
    assert kept["newest"] == 3
    assert kept["losses"] == kept["tensors"]
    assert len(kept["losses"]) == 6
    assert kept["seen by others"]
    assert trainer.state.global_step == 2
    uncut = run("masked", 12, 1, rows=ROWS_OF_ALL, num_train_epochs=1)
    assert error(found, uncut) < 1e-11
    assert found.losses == pytest.approx(uncut.losses, rel=1e-12)
