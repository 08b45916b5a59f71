"""A script with Accelerate on one process trains as PyTorch alone does on whole batches."""

import pytest
import torch
from accelerate import Accelerator
from tests.accelerate import scripts
from tests.accelerate.scripts import Script
from tests.masked_tokens import (
    BATCH,
    DECAY,
    RATE,
    ROWS,
    WRONG,
    Net,
    assert_whole,
    assert_wrong,
    data,
    error,
    flat,
    labels,
    loss_of,
    whole_batches,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import virtualbatch.torch as vb

WAYS = {
    "whole batches, cut evenly": lambda: scripts.ours(3),
    "cut into single rows": lambda: scripts.ours(1),
    "a size that divides nothing": lambda: scripts.ours(7),
    "a size above the batch": lambda: scripts.ours(64),
    "inside accumulate": lambda: scripts.ours_in_accumulate(3),
    "windows of five, the last ones short": lambda: scripts.windows(4, 5),
    "backward_fn": lambda: scripts.by_backward_fn(3),
    "compiled": lambda: scripts.ours(10, dynamo_backend="eager"),
}


@pytest.fixture(scope="module")
def usual():
    return scripts.usual(4, 5)


@pytest.mark.parametrize("way", WAYS)
def test_weights_norms_logged_losses_and_schedule_are_those_of_whole_batches(way, usual):
    found = WAYS[way]()
    assert len(found.norms) == 6
    assert found.rate == pytest.approx(RATE * DECAY**6, rel=1e-12)
    assert_whole(found)
    assert_wrong(usual)


def test_bfloat16_rounds_no_more_than_the_whole_batch_does():
    def distance(found):
        due = whole_batches().weights
        return float((found.weights - due).norm() / (due - flat(Net().double())).norm())

    options = {"mixed_precision": "bf16", "dtype": torch.float32}
    whole = distance(scripts.usual(BATCH, 1, **options))
    assert 1e-4 < distance(scripts.ours(3, **options)) <= 1.2 * whole
    assert distance(scripts.usual(4, 5, **options)) > WRONG > whole


def test_what_a_script_logs_is_the_loss_of_the_window(usual):
    """Inside `accumulate` it is that of the last micro-batch."""
    due = whole_batches().losses
    torch.testing.assert_close(scripts.windows(4, 5).losses, due, rtol=1e-12, atol=0)
    assert max(abs(a - b) for a, b in zip(usual.losses, due, strict=True)) > 0.05


def test_a_scaler_that_skips_an_update_skips_it_once():
    """Accelerate has one for float16, on GPUs only; the schedule waits for the optimizer."""

    def skipped(cut):
        forget()
        accelerator = Accelerator(cpu=True)
        # Its gradients overflow in the second update.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1)
        plain = Net()
        sgd = torch.optim.SGD(plain.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.StepLR(sgd, 1, DECAY)
        loader = DataLoader(data(), BATCH)
        model, optimizer, loader, schedule = accelerator.prepare(plain, sgd, loader, schedule)
        seen = []
        for factor, batch in zip((1.0, 1e38, 1.0), loader, strict=True):

            def loss_fn(batch, factor=factor):
                return loss_of(model)(batch) * factor

            before = flat(plain)
            if cut:
                loss = vb.loss(
                    loss_fn,
                    batch,
                    module=model,
                    microbatch_size=3,
                    weight=labels,
                    scaler=accelerator.scaler,
                )
            else:
                loss = loss_fn(batch)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            moved = not torch.equal(flat(plain), before)
            rate = schedule.get_last_lr()[0]
            seen.append((optimizer.step_was_skipped, moved, rate, accelerator.scaler.get_scale()))
        return seen, flat(plain)

    found, weights = skipped(True)
    due, whole = skipped(False)
    assert [(skip, moved) for skip, moved, *_ in found] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    assert found == due
    torch.testing.assert_close(weights, whole, rtol=1e-5, atol=1e-7)


def test_an_accelerator_that_accumulates_is_refused():
    script = Script(gradient_accumulation_steps=4)
    text = (
        r"^Accelerate must leave accumulation to virtualbatch\. "
        r"Got gradient_accumulation_steps=4 in its GradientState\. "
        r"Make the Accelerator with gradient_accumulation_steps=1\.$"
    )
    for batch in script.loader:
        with script.accelerator.accumulate(script.model), pytest.raises(ValueError, match=text):
            script.loss(batch, microbatch_size=3)
    assert all(parameter.grad is None for parameter in script.model.parameters())


def test_two_prepared_models_in_one_loss():
    class Body(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.table, self.hidden = net.table, net.hidden

        def forward(self, ids):
            return torch.tanh(self.hidden(self.table(ids)))

    def gradients(cut):
        forget()
        accelerator = Accelerator(cpu=True)
        net = Net().double()
        body, head = accelerator.prepare(Body(net), net.head)
        batch = data()[:BATCH]

        def loss_fn(batch):
            logits = head(body(batch[0]))
            return cross_entropy(logits.flatten(0, 1), batch[1].flatten())

        if cut:
            options = {"module": [body, head], "microbatch_size": 3, "weight": labels}
            accelerator.backward(vb.loss(loss_fn, batch, **options))
        else:
            for start in range(0, BATCH, 4):
                accelerator.backward(loss_fn([leaf[start : start + 4] for leaf in batch]) / 5)
        return [parameter.grad for parameter in net.parameters()]
