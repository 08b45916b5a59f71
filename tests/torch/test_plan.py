"""Planning: peaks against those of a real window, nothing changed, automatic sizes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.tiers import tiered
from torch import nn

import virtualbatch.torch as vb
from virtualbatch import Auto
from virtualbatch.plan.search import Search
from virtualbatch.torch._plan import plan as _plan
from virtualbatch.torch._plan.peak import peak_bytes

pytestmark = pytest.mark.usefixtures("untimed_plans")

ROWS = 96


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)

    def forward(self, x):
        return self.inner(x.reshape(len(x), 8, 32)).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(32, 48, batch_first=True)

    def forward(self, x):
        return self.inner(x.reshape(len(x), 8, 32))[0][:, -1]


class Undecided(nn.Module):
    """Needs values, which fake tensors have not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(256, 64)

    def forward(self, x):
        return self.inner(x) if x.mean().item() < 1e9 else x


MODELS = {
    "MLP": lambda: [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.Tanh()],
    "CNN": lambda: [
        nn.Unflatten(1, (1, 16, 16)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ],
    "transformer": lambda: [Attention()],
    "LSTM": lambda: [Recurrent()],
    "branch on values": lambda: [Undecided(), nn.ReLU()],
    "dropout": lambda: [nn.Linear(256, 512), nn.Dropout(0.5)],
    "half precision": lambda: [nn.Linear(256, 512).bfloat16(), nn.ReLU()],
    "weight norm": lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(256, 512)), nn.ReLU()],
}


def program(name):
    module = nn.Sequential(*MODELS[name](), nn.LazyLinear(4))
    dtype = torch.bfloat16 if name == "half precision" else torch.float32
    x = torch.randn(ROWS, 256, dtype=dtype)
    module.to(dtype)(x)
    y = torch.randint(0, 4, (ROWS,))

    def loss_fn(batch):
        x, y = batch
        return nn.functional.cross_entropy(module(x), y)

    return module, loss_fn, [x, y]


def held(module, batch):
    tensors = [*module.parameters(), *module.buffers(), *batch]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    "name", tiered(MODELS, ["CNN", "branch on values", "half precision"], "further models")
)
def test_peaks_are_those_of_real_windows(name):
    module, loss_fn, batch = program(name)
    plan = vb.plan(loss_fn, batch, module=module)
    assert {row.microbatch_size for row in plan.rows} >= {8, 32, ROWS}
    for row in plan.rows:
        module.zero_grad()

        def window(size=row.microbatch_size):
            vb.backward(loss_fn, batch, module=module, microbatch_size=size)

        real = held(module, batch) + peak_bytes(window)
        assert abs(row.peak_bytes / real - 1) < 0.02, row


def test_the_count_is_what_tensors_hold():
    def run():
        a = torch.ones(1000)
        b = a + a
        del a
        return b * b, b[10:]

    assert peak_bytes(run) == 8000


def test_a_line_predicts_sizes_that_were_not_measured():
    module, loss_fn, batch = program("CNN")
    rows = {row.microbatch_size: row.peak_bytes for row in peaks(module, loss_fn, batch)}
    slope = (rows[32] - rows[8]) / 24
    for size in (16, 24, 48):
        real = held(module, batch) + peak_bytes(
            lambda size=size: vb.backward(loss_fn, batch, module=module, microbatch_size=size)
        )
        module.zero_grad()
        assert abs((rows[8] + slope * (size - 8)) / real - 1) < 0.10


def peaks(module, loss_fn, batch):
    return vb.plan(loss_fn, batch, module=module).rows


@pytest.mark.parametrize("share", tiered([0.3, 0.6, 0.9], [0.6], "further limits"))
@pytest.mark.parametrize("name", ["CNN", "transformer", "LSTM"])
def test_a_limit_is_kept(name, share):
    module, loss_fn, batch = program(name)
    all_rows = peaks(module, loss_fn, batch)
    small, whole = all_rows[0].peak_bytes, all_rows[-1].peak_bytes
    limit = int(small + share * (whole - small))
    plan = vb.plan(loss_fn, batch, module=module, memory_limit=limit)
    chosen = next(row for row in plan.rows if row.microbatch_size == plan.microbatch_size)
    assert chosen.measured
    assert chosen.peak_bytes <= limit
    assert plan.microbatch_size < ROWS


def test_the_whole_batch_may_fit_where_its_parts_do_not():
    # Many parameters and few activations: cut, two sets of gradients exist at once.
    module, loss_fn, batch = program("MLP")
    rows = peaks(module, loss_fn, batch)
    assert rows[0].peak_bytes > rows[-1].peak_bytes
    limit = rows[-1].peak_bytes
    plan = vb.plan(loss_fn, batch, module=module, memory_limit=limit)
    assert plan.microbatch_size == ROWS


def test_an_impossible_limit_is_refused():
    module, loss_fn, batch = program("MLP")
    with pytest.raises(ValueError, match=r"must hold a micro-batch of one row.* one row needs "):
        vb.plan(loss_fn, batch, module=module, memory_limit="10KiB")


def test_a_window_is_refused():
    module, loss_fn, batch = program("MLP")
    with pytest.raises(ValueError, match="A Window is already cut"):
        vb.plan(loss_fn, vb.Window([batch]), module=module)


def test_one_row_is_a_plan():
    module, loss_fn, (x, y) = program("MLP")
    plan = vb.plan(loss_fn, [x[:1], y[:1]], module=module)
    assert (plan.microbatch_size, plan.accumulation_steps) == (1, 1)


def test_what_runs_out_while_timing_does_not_fit(monkeypatch, quick_plans):
    module, loss_fn, batch = program("MLP")
    timing = _plan._timing

    def timed(program, cut, shares):
        if len(cut) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timing(program, cut, shares)

    monkeypatch.setattr(_plan, "_timing", timed)
    assert vb.plan(loss_fn, batch, module=module).microbatch_size < ROWS


def test_an_error_of_the_loss_is_not_hidden():
    module, _, batch = program("MLP")

    def loss_fn(batch):
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        vb.plan(loss_fn, batch, module=module)


def state(module):
    """Everything that planning must leave as it is."""
    found = [(name, x.clone()) for name, x in module.state_dict().items()]
    found += [("grad", x.grad if x.grad is None else x.grad.clone()) for x in module.parameters()]
    found += [("random", torch.get_rng_state())]
    return found


def assert_same(a, b):
    for (name, x), (other, y) in zip(a, b, strict=True):
        assert name == other
        assert (x is None and y is None) or torch.equal(x, y), name


@pytest.mark.parametrize("name", tiered(MODELS, ["CNN", "dropout"], "further models"))
@pytest.mark.parametrize("with_gradients", [False, True])
def test_planning_changes_nothing(name, with_gradients, quick_plans):
    module, loss_fn, batch = program(name)
    if with_gradients:
        vb.backward(loss_fn, batch, module=module, microbatch_size=40)
    before = state(module)
    identities = [id(x) for x in (*module.parameters(), *module.buffers())]
    attributes = [sorted(vars(layer)) for layer in module.modules()]
    vb.plan(loss_fn, batch, module=module)
    assert_same(before, state(module))
    assert identities == [id(x) for x in (*module.parameters(), *module.buffers())]
    assert attributes == [sorted(vars(layer)) for layer in module.modules()]


def trained(size, batches, name="dropout"):
    torch.manual_seed(3)
    module, loss_fn, (x, y) = program(name)
    optimizer = torch.optim.Adam(module.parameters())
    losses = []
    for rows in batches:
        optimizer.zero_grad()
        losses.append(
            vb.backward(loss_fn, [x[:rows], y[:rows]], module=module, microbatch_size=size)
        )
        optimizer.step()
    return losses, state(module)


@pytest.mark.parametrize("name", ["dropout", "CNN", "half precision"])
def test_a_planned_run_is_that_of_the_same_size(name, caplog, quick_plans):
    batches = [ROWS, 17, ROWS]
    with caplog.at_level(logging.INFO, "virtualbatch"):
        losses, after = trained("auto", batches, name)
    (line,) = [message for message in caplog.messages if "microbatch_size=" in message]
    size = int(line.split("microbatch_size=")[1].split()[0])
    due, due_after = trained(size, batches, name)
    assert losses == due
    assert_same(after, due_after)


def test_a_batch_is_planned_once_for_each_signature(monkeypatch):
    module, loss_fn, (x, y) = program("MLP")
    made = []
    ask = Search.plan
    monkeypatch.setattr(Search, "plan", lambda self: made.append(self) or ask(self))
    size = Auto(memory_limit="1GiB")
    for rows in (64, 64, 3, 64, 96, 96, 64):
        vb.backward(loss_fn, [x[:rows], y[:rows]], module=module, microbatch_size=size)
    assert len(made) == 2


def test_auto_is_kept_for_the_module(monkeypatch):
    made = []
    ask = Search.plan
    monkeypatch.setattr(Search, "plan", lambda self: made.append(self) or ask(self))
    for _ in range(2):
        module, loss_fn, batch = program("MLP")
        for _ in range(2):
            vb.backward(loss_fn, batch, module=[module], microbatch_size="auto")
    assert len(made) == 2


def counted(monkeypatch):
    """A list that grows with each plan that is made."""
    made = []
    ask = Search.plan
    monkeypatch.setattr(Search, "plan", lambda self: made.append(ask(self)) or made[-1])
    return made


@pytest.mark.parametrize("size", ["auto", Auto(memory_limit="1GiB")], ids=["auto", "Auto"])
def test_another_loss_of_the_same_module_and_shapes_is_planned_anew(size, monkeypatch):
    made = counted(monkeypatch)
    module, _, batch = program("MLP")
    for criterion in (nn.functional.cross_entropy, nn.functional.multi_margin_loss):
        for _ in range(2):
            # Made anew at each call, as loops do.
            vb.backward(
                lambda batch, criterion=criterion: criterion(module(batch[0]), batch[1]),
                batch,
                module=module,
                microbatch_size=size,
            )
    assert len(made) == 2


def test_a_plan_of_a_file_is_not_used_under_a_smaller_limit(tmp_path, monkeypatch):
    made = counted(monkeypatch)
    module, loss_fn, batch = program("CNN")
    rows = {row.microbatch_size: row.peak_bytes for row in peaks(module, loss_fn, batch)}
    for limit in ("1GiB", (rows[8] + rows[32]) // 2):
        size = Auto(file=tmp_path / "plans.json", memory_limit=limit)
        vb.backward(loss_fn, batch, module=module, microbatch_size=size)
    assert [plan.microbatch_size < 32 for plan in made[1:]] == [False, True]


def test_a_plan_is_read_from_the_file_of_another_run(tmp_path, monkeypatch):
    file = tmp_path / "plans.json"
    for _ in range(2):
        module, loss_fn, batch = program("MLP")
        vb.backward(loss_fn, batch, module=module, microbatch_size=Auto(file=file))
        monkeypatch.setattr(Search, "plan", lambda self: pytest.fail("planned again"))


def test_sizes_are_tried_where_fake_tensors_do_not_fit():
    script = Path(__file__).with_name("tight.py")
    # Else the C library keeps what is freed, and what fits is a matter of luck.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    tried = [row["microbatch_size"] for row in found["plan"]["rows"]]
    assert tried[:2] == [1, 2]
    assert tried[-1] < 256
    assert found["plan"]["microbatch_size"] in tried
    (line,) = found["log"]
    assert "sizes are tried from the smallest" in line
    assert found["intact"]
