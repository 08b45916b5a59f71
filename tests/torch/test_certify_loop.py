"""certify_loop on loops as people write them for PyTorch."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import virtualbatch.torch as vb

ROWS = 12


class Training:
    def __init__(self, optimizer=torch.optim.SGD, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.optimizer = optimizer(self.model.parameters(), 0.1, **options)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )

    def loss(self, batch):
        return F.cross_entropy(self.model(batch["x"]), batch["y"], ignore_index=-1)

    def state(self):
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "average": self.average,
        }


def batches(ignored=False):
    torch.manual_seed(1)
    x, y = torch.randn(2, ROWS, 6, dtype=torch.float64), torch.randint(0, 4, (2, ROWS))
    if ignored:
        y[:, :5] = -1
        y[:, 2] = 0
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def usual(training, clip=None):
    """The loop of a hundred tutorials, right for equal micro-batches and full windows."""

    def loop(microbatches, accumulation_steps):
        training.optimizer.zero_grad()
        for i, piece in enumerate(microbatches):
            (training.loss(piece) / accumulation_steps).backward()
            if (i + 1) % accumulation_steps == 0:
                if clip:
                    nn.utils.clip_grad_norm_(training.model.parameters(), clip)
                training.optimizer.step()
                training.optimizer.zero_grad()
                training.schedule.step()
                training.average.update_parameters(training.model)

    return loop


def right(training, clip=None):
    def loop(microbatches, accumulation_steps):
        for start in range(0, len(microbatches), accumulation_steps):
            window = microbatches[start : start + accumulation_steps]
            count = sum(int((piece["y"] >= 0).sum()) for piece in window)
            training.optimizer.zero_grad()
            for piece in window:
                (training.loss(piece) * (int((piece["y"] >= 0).sum()) / count)).backward()
            if clip:
                nn.utils.clip_grad_norm_(training.model.parameters(), clip)
            training.optimizer.step()
            training.schedule.step()
            training.average.update_parameters(training.model)

    return loop


def ours(training):
    def loop(microbatches, accumulation_steps):
        for start in range(0, len(microbatches), accumulation_steps):
            window = vb.Window(microbatches[start : start + accumulation_steps])
            training.optimizer.zero_grad()
            vb.backward(
                training.loss, window, module=training.model, weight=lambda b: (b["y"] >= 0).sum()
            )
            training.optimizer.step()
            training.schedule.step()
            training.average.update_parameters(training.model)

    return loop


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("make", [right, ours])
@pytest.mark.parametrize("ignored", [False, True])
def test_no_false_alarm(make, optimizer, ignored):
    training = Training(optimizer)
    before = copy.deepcopy({name: part.state_dict() for name, part in training.state().items()})
    found = vb.certify_loop(make(training), batches(ignored), microbatch_size=4, **training.state())
    assert found.findings == (), found
    assert found.exact
    after = {name: part.state_dict() for name, part in training.state().items()}
    assert str(before) == str(after)


def test_clipping_once_is_right():
    training = Training()
    found = vb.certify_loop(
        right(training, clip=1e-2), batches(), microbatch_size=4, **training.state()
    )
    assert found.exact


def changed(training, **change):
    """The usual loop with one more mistake, and a last window that is not dropped."""

    def loop(microbatches, accumulation_steps):
        training.optimizer.zero_grad()
        for i, piece in enumerate(microbatches):
            last = i + 1 == len(microbatches)
            in_window = i % accumulation_steps
            held = min(accumulation_steps, len(microbatches) - (i - in_window))
            divisor = change.get("divisor", lambda held: held)(held)
            (training.loss(piece) / divisor).backward()
            if "clip_each" in change:
                nn.utils.clip_grad_norm_(training.model.parameters(), change["clip_each"])
            if change.get("step_each"):
                training.optimizer.step()
            if (i + 1) % accumulation_steps == 0 or last:
                if not change.get("step_each"):
                    training.optimizer.step()
                if not change.get("stale"):
                    training.optimizer.zero_grad()
                if not change.get("schedule_each"):
                    training.schedule.step()
                if not change.get("average_each"):
                    training.average.update_parameters(training.model)
            if change.get("schedule_each"):
                training.schedule.step()
            if change.get("average_each"):
                training.average.update_parameters(training.model)

    return loop


# loop, whether labels are ignored, kind, text of where, text of why
WRONG = {
    "dropped last window": (usual, False, "last_window", "model.", "dropped"),
    "mean of means": (changed, True, "weight", "model.", "mean of means"),
    "no division": (
        lambda t: changed(t, divisor=lambda held: 1),
        False,
        "sum_loss",
        "model.",
        "3 times",
    ),
    "divided twice": (
        lambda t: changed(t, divisor=lambda held: held**2),
        False,
        "sum_loss",
        "model.",
        "0.333",
    ),
    "gradients kept": (
        lambda t: changed(t, stale=True),
        False,
        "stale_buffer",
        "model.",
        "second is not",
    ),
    "schedule each": (
        lambda t: changed(t, schedule_each=True),
        False,
        "per_microbatch",
        "schedule.",
        "3 times",
    ),
    "average each": (
        lambda t: changed(t, average_each=True),
        False,
        "per_microbatch",
        "average.",
        "",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_mistake_is_named(name):
    make, ignored, kind, where, why = WRONG[name]
    training = Training()
    found = vb.certify_loop(make(training), batches(ignored), microbatch_size=4, **training.state())
    assert not found.exact
    (finding,) = found.findings
    assert finding.kind == kind, found
    assert where in finding.where
    assert why in finding.why


def test_a_share_in_a_narrow_dtype_is_named():
    # Integers divided by integers are float32 in PyTorch, whatever the model is.
    training = Training()

    def loop(microbatches, accumulation_steps):
        for start in range(0, len(microbatches), accumulation_steps):
            window = microbatches[start : start + accumulation_steps]
            counts = torch.tensor([len(piece["y"]) for piece in window])
            training.optimizer.zero_grad()
            for piece, share in zip(window, counts / counts.sum(), strict=True):
                (training.loss(piece) * share).backward()
            training.optimizer.step()

    found = vb.certify_loop(loop, batches(), microbatch_size=5, **training.state())
    assert [finding.kind for finding in found.findings] == ["low_precision"]


def test_batches_of_a_loader():
    training = Training()
    data = [{"x": x, "y": y} for batch in batches() for x, y in zip(*batch.values(), strict=True)]
    loader = torch.utils.data.DataLoader(data, batch_size=ROWS, shuffle=True)
    assert vb.certify_loop(right(training), loader, microbatch_size=4, **training.state()).exact
    found = vb.certify_loop(usual(training), loader, microbatch_size=4, **training.state())
    assert found.findings[0].kind == "last_window"


def test_the_line_and_the_count_of_the_updates_are_told():
    training = Training(torch.optim.AdamW)
    found = vb.certify_loop(
        changed(training, step_each=True), batches(), microbatch_size=4, **training.state()
    )
    lines, first = inspect.getsourcelines(changed)
    line = first + [text.strip() for text in lines].index("training.optimizer.step()")
    assert f"updated at test_certify_loop.py:{line}" in found.findings[0].where
    assert "The optimizers made 7 updates in 3 windows." in found.notes


def test_what_is_trained_is_named_and_the_rest_counted():
    training = Training(torch.optim.AdamW)
    found = vb.certify_loop(usual(training), batches(), microbatch_size=4, **training.state())
    where = found.findings[0].where
    assert where.startswith("model.0.weight, model.0.bias, model.2.weight, model.2.bias and ")
    assert " more, updated at test_certify_loop.py:" in where


def test_an_optimizer_that_steps_each_time_is_named():
    training = Training(torch.optim.AdamW)
    found = vb.certify_loop(
        changed(training, step_each=True), batches(), microbatch_size=4, **training.state()
    )
    assert found.findings[0].kind == "per_microbatch"
    assert "optimizer.state.0.step" in found.findings[0].where


def test_state_without_a_state_dict_is_refused():
    with pytest.raises(TypeError, match="Got model=int"):
        vb.certify_loop(lambda pieces, k: None, batches(), microbatch_size=4, model=3)
