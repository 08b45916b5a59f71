"""What is logged and counted is that of the whole batch, told once, also if memory runs out."""

from functools import partial

import pytest
import torch
import torchmetrics
from tests.lightning.nets import Net, Run, error, largest_difference, tokens

import virtualbatch.lightning as vb

EXACT = 1e-12


def test_whole_batches_log_what_the_uncut_run_logs(uncut):
    """Means, sums, maxima, metrics; by name, by step and by epoch."""
    run = Run(20, 1, {"microbatch_size": 3, "weight": tokens})

    assert largest_difference(run.log, uncut.log) <= EXACT
    assert {"loss_step", "loss_epoch", "item_step", "largest_step", "rows", "mean"} <= {
        name for _, row in run.log for name in row
    }


@pytest.mark.parametrize("size", [None, 3])
def test_collected_batches_log_what_the_uncut_run_logs(uncut, own, size):
    """Lightning's own logs the last batch, and averages batches of other numbers of tokens."""
    run = Run(4, 5, {"microbatch_size": size, "weight": tokens})

    assert largest_difference(run.log, uncut.log) <= EXACT
    epochs = [row["loss_epoch"] for _, row in uncut.log if "loss_epoch" in row]
    theirs = [row["loss_epoch"] for _, row in own.log if "loss_epoch" in row]
    assert max(abs(a - b) for a, b in zip(epochs, theirs, strict=True)) > 1e-3


def _out_of_memory(most, after):
    class Tight(Net):
        """Runs out of memory behind everything that a step does."""

        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            Tight.tries += 1
            if len(batch[0]) > most and Tight.tries > after:
                Tight.failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return output

    Tight.tries = Tight.failures = 0
    return Tight


@pytest.mark.parametrize(
    ("batch", "steps", "size"), [(20, 1, 6), (20, 1, None), (4, 5, None)], ids=str
)
def test_an_update_that_runs_out_of_memory_counts_once(uncut, batch, steps, size):
    """Logs, metrics, lists and numbers of the module are as if only the last attempt had been."""
    run = Run(batch, steps, {"microbatch_size": size, "weight": tokens}, _out_of_memory(3, 2))

    assert error(run, uncut) <= EXACT
    assert largest_difference(run.log, uncut.log) <= EXACT
    assert sum(rows for _, rows in run.module.seen) == 2 * 46
    assert run.module.calls == len(run.module.seen)
    assert type(run.module).failures > 0


@pytest.mark.proves_itself
def test_the_proof_of_the_first_update_leaves_no_trace(uncut):
    """It calls the step some ten times more, on rows of its own."""
    run = Run(20, 1, {"microbatch_size": 3, "weight": tokens})

    assert largest_difference(run.log, uncut.log) <= EXACT
    assert sum(rows for _, rows in run.module.seen) == 2 * 46
    assert run.module.calls == 2 * (7 + 7 + 2)


@pytest.mark.proves_itself
def test_what_a_module_counts_in_tensors_is_counted_once():
    """In place, as `+=` does, also in a tensor with an entry for each class."""

    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.total, self.of_words = torch.tensor(0), {"seen": torch.zeros(11)}

        def training_step(self, batch, batch_idx):
            self.total += len(batch[0])
            self.of_words["seen"] += torch.bincount(batch[0].flatten(), minlength=11)
            return super().training_step(batch, batch_idx)

    run = Run(20, 1, {"microbatch_size": 3, "weight": tokens}, Counts, max_epochs=1)

    assert run.module.total == 46
    assert run.module.of_words["seen"].sum() == 46 * 6


def test_planning_leaves_no_trace(uncut, untimed_plans):
    run = Run(4, 5, {"microbatch_size": "auto", "weight": tokens})

    assert error(run, uncut) <= EXACT
    assert largest_difference(run.log, uncut.log) <= EXACT
    assert sum(rows for _, rows in run.module.seen) == 2 * 46


def test_micro_batches_keep_the_number_of_the_batch_that_they_are_of():
    run = Run(4, 5, {"microbatch_size": 3, "weight": tokens}, max_epochs=1)

    assert [number for number, _ in run.module.seen] == [k for k in range(12) for _ in (0, 1)][:23]


class _Collection(Net):
    def __init__(self):
        super().__init__()
        common = {"task": "multiclass", "num_classes": 11, "ignore_index": -100}
        self.scores = torchmetrics.MetricCollection(
            {
                "accuracy": torchmetrics.Accuracy(**common),
                "recall": torchmetrics.Recall(**common, average="macro"),
            }
        )
        self.values = torchmetrics.CatMetric()

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        self.scores.update(self(batch[0]).transpose(1, 2), batch[1])
        self.log_dict(self.scores, on_step=False, on_epoch=True)
        self.values.update(output["largest"])
        return output


class _TightCollection(_Collection):
    tries = 0

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        _TightCollection.tries += 1
        if _TightCollection.tries == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return output


@pytest.mark.proves_itself
def test_collections_of_metrics_and_lists_of_values_count_once():
    """A first update on a row or two would put unlike metrics into one group."""
    whole = Run(20, net=_Collection)
    run = Run(20, 1, {"microbatch_size": 5, "weight": tokens}, _TightCollection)

    assert largest_difference(run.log, whole.log) <= EXACT
    torch.testing.assert_close(run.module.values.compute(), whole.module.values.compute())
    assert len(run.module.values.compute()) == 2 * 46


class _ByHand(Net):
    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        right = self(batch[0]).argmax(-1) == batch[1]
        kept = batch[1] != -100
        self.log("right", right[kept].double().mean(), batch_size=int(kept.sum()), on_epoch=True)
        for value in (1.0, len(batch[0])):
            self.log("twice", value, reduce_fx="sum", on_step=False, on_epoch=True)
        return output


def test_a_batch_size_that_is_given_weighs_and_a_name_may_be_logged_twice():
    whole = Run(20, net=_ByHand, max_epochs=1)
    run = Run(20, 1, {"microbatch_size": 3, "weight": tokens}, _ByHand, max_epochs=1)

    found, expected = (
        [row["right_step"] for _, row in log if "right_step" in row] for log in (run.log, whole.log)
    )
    assert len(found) == 3
    assert found == pytest.approx(expected, rel=EXACT)
    ends = [{**row} for log in (run.log, whole.log) for _, row in log if "right_epoch" in row]
    assert ends[0]["right_epoch"] == pytest.approx(ends[1]["right_epoch"], rel=EXACT)
    # Three updates count a row's one each in the uncut run; each micro-batch does here.
    assert ends[1]["twice"] == 46 + 3
    assert ends[0]["twice"] == 46 + 7 + 7 + 2


class _Empty(Net):
    """Its rows without any token that counts give NaN."""

    def training_step(self, batch, batch_idx):
        ids, labels = batch[0], batch[1].clone()
        labels[ids[:, 0] < 6] = -100
        return super().training_step((ids, labels), batch_idx)


def _tokens_of_some(batch):
    return ((batch[1] != -100) & (batch[0][:, :1] >= 6)).sum()


def test_rows_that_count_nothing_are_in_what_goes_by_rows():
    whole = Run(20, net=_Empty)
    run = Run(20, 1, {"microbatch_size": 1, "weight": _tokens_of_some}, _Empty)

    assert error(run, whole) <= EXACT
    assert largest_difference(run.log, whole.log) <= EXACT


class _Sum(Net):
    def training_step(self, batch, batch_idx):
        loss = (self(batch[0]) ** 2).sum() / 1000
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss


def test_a_loss_that_is_a_sum_is_logged_as_one():
    whole = Run(20, net=_Sum)
    run = Run(20, 1, {"microbatch_size": 3, "weight": "sum"}, _Sum)

    assert error(run, whole) <= EXACT
    assert largest_difference(run.log, whole.log) <= EXACT


def test_a_graph_is_not_logged():
    class Graph(Net):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            self.log("graph", output["loss"], enable_graph=True)
            return output

    with pytest.raises(ValueError, match=r"without their graph.*Got self.log\('graph'"):
        Run(20, 1, {"microbatch_size": 3, "weight": tokens}, Graph)


def test_an_error_in_the_middle_of_an_update_leaves_the_module_as_it_was():
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            if batch_idx == 1 and len(self.seen) == 9:
                raise ZeroDivisionError
            return output

    made = []
    net = partial(lambda: made.append(Broken()) or made[0])
    with pytest.raises(ZeroDivisionError):
        Run(20, 1, {"microbatch_size": 3, "weight": tokens}, net)

    module = made[0]
    assert len(module.seen) == module.calls == 7
    assert "log" not in vars(module)
    assert module.trainer.accumulate_grad_batches == 1
    vb.restore(module)
    assert "training_step" not in vars(module)
