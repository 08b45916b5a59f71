"""The weights of an update are those of its whole batch, where Lightning's own are not."""

from functools import partial
from itertools import pairwise

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from tests.lightning.nets import Net, Run, error, flat, rows, tokens
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

EXACT = 1e-12


@pytest.mark.parametrize(
    ("batch", "steps", "size"),
    [
        pytest.param(20, 1, 3, id="20 cut by 3"),
        pytest.param(20, 1, 1, id="20 cut by 1"),
        pytest.param(20, 1, None, id="20 as it is"),
        pytest.param(4, 5, None, id="5 of 4"),
        pytest.param(4, 5, 3, id="5 of 4 cut by 3"),
    ],
)
def test_weights_norms_rates_and_outputs_are_those_of_the_whole_batch(
    uncut, own, batch, steps, size
):
    """Two epochs of updates of 20, 20 and 6 rows; Lightning's own are wrong by their movement."""
    run = Run(batch, steps, {"microbatch_size": size, "weight": tokens})

    assert error(run, uncut) <= EXACT
    assert error(own, uncut) > 0.5
    assert run.trainer.global_step == uncut.trainer.global_step == 6
    per_epoch = len(run.watch.rates) // 2
    ends = [min(steps * k, per_epoch) - 1 for k in range(1, 4)]
    ends += [per_epoch + end for end in ends]
    for name in ("rates", "norms"):
        found = getattr(run.watch, name)
        expected = getattr(uncut.watch, name)
        assert [found[end] for end in ends] == pytest.approx(expected, rel=1e-12)
    for end, outputs in zip(ends, uncut.watch.outputs, strict=True):
        assert run.watch.outputs[end].keys() == outputs.keys()
        for name, value in outputs.items():
            torch.testing.assert_close(run.watch.outputs[end][name], value, rtol=1e-12, atol=0)
    others = set(range(len(run.watch.outputs))) - set(ends)
    assert all(run.watch.outputs[k] == {"loss": torch.zeros(())} for k in others)


def test_whole_batches_have_the_events_of_the_uncut_run(uncut):
    run = Run(20, 1, {"microbatch_size": 3, "weight": tokens})

    assert run.watch.events == uncut.watch.events


def test_collected_batches_have_the_events_of_lightning(own):
    run = Run(4, 5, {"weight": tokens})

    assert run.watch.events == own.watch.events


def _by_hand(updates):
    """Weights after updates, each of the rows from start to stop after so many schedule steps."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    ids, labels = rows().tensors
    for start, stop, scheduled in updates:
        optimizer.param_groups[0]["lr"] = 0.01 * 0.9**scheduled
        optimizer.zero_grad()
        logits = net(ids[start:stop])
        cross_entropy(logits.flatten(0, 1), labels[start:stop].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return flat(net)


def _cut(size, scheduled):
    starts = range(0, 46, size)
    return [(start, min(start + size, 46), scheduled + k) for k, start in enumerate(starts)]


def _off(run, expected):
    return float((run.weights - expected).abs().max() / (expected - run.start).abs().max())


def test_a_schedule_of_accumulation_is_followed():
    """Five batches an update in the first epoch and two in the second, against a loop by hand."""
    expected = _by_hand(_cut(20, 0) + _cut(8, 3))
    schedule = partial(GradientAccumulationScheduler, {0: 5, 1: 2})

    ours = Run(4, 1, {"weight": tokens}, callbacks=[schedule()])

    assert _off(ours, expected) <= EXACT
    assert _off(Run(4, 1, callbacks=[schedule()]), expected) > 0.1


def test_an_update_that_is_made_shorter_in_the_middle_keeps_its_batches():
    """A callback asks for two batches instead of four, when one of four has come."""

    class Changes(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            trainer.accumulate_grad_batches = 4 if batch_idx < 5 else 2

    ids, labels = rows().tensors
    ends = [0, 16, 24, 32, 40, 46]
    whole = [(ids[a:b], labels[a:b]) for a, b in pairwise(ends)]
    expected = Run(loader=DataLoader(whole, batch_size=None), max_epochs=1)

    ours = Run(4, 4, {"weight": tokens}, callbacks=[Changes()], max_epochs=1)

    assert ours.trainer.global_step == 5
    assert error(ours, expected) <= EXACT


def test_an_optimizer_may_run_the_window_of_a_whole_batch_again():
    """LBFGS calls its closure three times an update."""
    lbfgs = partial(Net, partial(torch.optim.LBFGS, lr=0.1, max_iter=3))
    whole = Run(20, net=lbfgs)

    ours = Run(20, 1, {"microbatch_size": 3, "weight": tokens}, net=lbfgs)

    assert whole.module.calls > 6
    assert error(ours, whole) <= 1e-11


class _Stream(IterableDataset):
    def __iter__(self):
        yield from rows()


def test_a_stream_without_length_has_a_short_last_update(uncut):
    loader = DataLoader(_Stream(), batch_size=4)

    ours = Run(4, 5, {"weight": tokens}, loader=loader)

    assert error(ours, uncut) <= EXACT
    assert ours.trainer.global_step == 6


class _StopsEarly(Net):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 7 else None


def test_batches_of_an_update_that_an_epoch_breaks_off_are_dropped():
    """An epoch of seven batches has one update of five; the two others go into none."""
    # Lightning's schedule counts the end of an epoch as a step.
    expected = _by_hand([(0, 20, 0), (0, 20, 2)])

    ours = Run(4, 5, {"weight": tokens}, net=_StopsEarly)

    assert ours.trainer.global_step == 2
    assert _off(ours, expected) <= EXACT


class _Narrow(Net):
    def __init__(self):
        super().__init__()
        self.float()
        self.mean.set_dtype(torch.float32)


def test_bf16_mixed_is_as_near_to_float64_as_the_uncut_run(uncut):
    whole = Run(20, net=_Narrow, precision="bf16-mixed")
    ours = Run(20, 1, {"microbatch_size": 3, "weight": tokens}, _Narrow, precision="bf16-mixed")
    theirs = Run(4, 5, net=_Narrow, precision="bf16-mixed")

    assert error(ours, uncut) <= 1.2 * error(whole, uncut)
    assert error(theirs, uncut) > 10 * error(ours, uncut)


def _in_float16(scale, ours):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    return Run(20, 1, ours, _Narrow, plugins=[plugin]), scaler.get_scale()


def test_float16_underflows_no_more_than_in_the_uncut_run():
    """Micro-batches run at the scale of the trainer's scaler, which is divided out once."""
    whole, _ = _in_float16(2.0**16, None)
    ours, scale = _in_float16(2.0**16, {"microbatch_size": 1, "weight": tokens})

    assert scale == 2.0**16
    assert error(ours, whole) <= torch.finfo(torch.float16).eps


# The schedule goes on although updates are skipped, in Lightning alone as well.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_an_overflow_skips_an_update_once():
    ours, scale = _in_float16(2.0**60, {"microbatch_size": 3, "weight": tokens})

    assert scale == 2.0**54
    assert torch.equal(ours.weights, ours.start)
