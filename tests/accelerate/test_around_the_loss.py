"""What Accelerate does around a loss, when that is the loss of a window."""

import pytest
import torch
from accelerate import Accelerator, DistributedType
from tests.accelerate import scripts
from tests.accelerate.scripts import Script, forget
from tests.masked_tokens import (
    BATCH,
    DECAY,
    EPOCHS,
    RATE,
    ROWS,
    WRONG,
    Net,
    assert_whole,
    data,
    flat,
    labels,
    loss_of,
)
from tests.oracle import assert_all_close
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import virtualbatch.torch as vb


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


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_an_engine_with_a_backward_pass_of_its_own_is_refused(engine):
    script = Script()
    # The engine is not installed; this is what tells `accelerator.backward` of it.
    script.accelerator.state.distributed_type = DistributedType[engine]
    text = rf"accumulate by themselves\. Got DistributedType\.{engine} in .* Use DDP or fully_shard"
    with pytest.raises(ValueError, match=text):
        script.loss(next(iter(script.loader)), microbatch_size=3)


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

    whole = Net().double()
    loss_of(whole)(data()[:BATCH]).backward()
    due = [parameter.grad for parameter in whole.parameters()]
    assert_all_close(gradients(True), due)
    usual = zip(gradients(False), due, strict=True)
    assert max(float((a - b).abs().max() / b.abs().max()) for a, b in usual) > WRONG


def test_a_state_saved_between_updates_goes_on_to_the_bit(tmp_path):
    """Also with another size of micro-batches, then to rounding."""

    def updates(script, batches, size=3):
        for batch in batches:
            script.update(script.loss(batch, microbatch_size=size))
        return script.trained()

    script = Script()
    first, *others = list(script.loader)
    updates(script, [first])
    script.accelerator.save_state(str(tmp_path))
    due = updates(script, others)
    for size in (3, 7):
        again = Script()
        again.accelerator.load_state(str(tmp_path))
        rest = again.accelerator.skip_first_batches(again.loader, 1)
        found = updates(again, rest, size)
        assert found.rate == due.rate
        if size == 3:
            assert torch.equal(found.weights, due.weights)
        torch.testing.assert_close(found.weights, due.weights, rtol=1e-11, atol=1e-13)


def test_a_window_without_a_label_has_no_gradient_and_is_an_update():
    """A mean of no label is NaN."""
    script = Script()
    ids, wanted = data()[:BATCH]
    batch = [ids, torch.full_like(wanted, -100)]
    assert loss_of(script.model)(batch).isnan()
    before = flat(script.model)
    script.update(script.loss(batch, microbatch_size=3))
    assert script.losses == script.norms == [0.0]
    # AdamW shrinks the weights, and nothing else.
    torch.testing.assert_close(flat(script.model), before * (1 - RATE * 0.01), rtol=1e-12, atol=0)
    assert script.schedule.get_last_lr() == [RATE * DECAY]


def test_evaluation_is_the_mean_of_all_rows():
    script = Script(batch_size=4)
    script.model.eval()
    with torch.no_grad():
        (found,) = (script.loss(w) for w in vb.windows(script.loader, accumulation_steps=12))
        of_batches = [loss_of(script.model)(batch) for batch in script.loader]
        due = loss_of(script.model)(data()[:ROWS])
    torch.testing.assert_close(found, due, rtol=1e-12, atol=0)
    assert abs(torch.stack(of_batches).mean() - due) > 1e-3
    assert all(parameter.grad is None for parameter in script.model.parameters())


def test_a_window_that_ran_out_of_memory_is_one_update():
    script = Script()
    sizes, at = [], 3

    def hungry(batch):
        sizes.append(len(batch[0]))
        if len(sizes) == at:
            raise torch.OutOfMemoryError("out of memory")
        return loss_of(script.model)(batch)

    for _ in range(EPOCHS):
        for batch in script.loader:
            loss = vb.loss(hungry, batch, module=script.model, microbatch_size=10, weight=labels)
            script.update(loss)
    assert sizes[:9] == [10, 10, 10, 5, 5, 5, 5, 3, 3]
    assert_whole(script.trained())


@pytest.mark.proves_itself
def test_the_first_window_of_a_prepared_model_proves_itself():
    script = Script()
    batch = next(iter(script.loader))
    with pytest.raises(ValueError, match="weight"):
        vb.loss(loss_of(script.model), batch, module=script.model, microbatch_size=3)
    assert all(parameter.grad is None for parameter in script.model.parameters())
    assert_whole(scripts.ours(3))
