"""Memory that runs out at any operation of a window: 100 points of 100 give the same update.

Every operation that makes a tensor may be the one that gets no memory, whether the loss, the
backward pass, the buffer or what adds it to `.grad` asks for it.
"""

import random
from collections import Counter

import pytest
import torch
from tests.tiers import tiered
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import virtualbatch.torch as vb
from virtualbatch.torch._commit import Commit
from virtualbatch.torch._gradients import WindowGradients

ROWS = 24
SEEDS = 100
# One of each phase.
QUICK = (0, 1, 2, 12, 29)
PHASES = ("weight", "forward", "backward", "accumulate", "commit")


class Allocations(TorchDispatchMode):
    """Notes the phase of each operation that takes memory, and lets one of them run out."""

    def __init__(self, fail=None):
        super().__init__()
        self.fail = fail
        self.phase = "accumulate"
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        if any(x.untyped_storage()._cdata not in given for x in tensors(result)):
            self.seen.append(self.phase)
            if len(self.seen) - 1 == self.fail:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    def during(self, phase, run):
        def marked(*args, **kwargs):
            before, self.phase = self.phase, phase
            try:
                return run(*args, **kwargs)
            finally:
                self.phase = before

        return marked


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def update(monkeypatch, size, case, fail=None):
    """One window; returns everything that it leaves, and the phases of its operations."""
    dtype, scaled, held = case
    torch.manual_seed(5)
    module = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.4), nn.Linear(16, 1)
    ).to(dtype)
    batch = [torch.randn(ROWS, 6, dtype=dtype), (torch.rand(ROWS) < 0.7).to(dtype)]
    if held:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    points = Allocations(fail)

    def loss_fn(batch):
        x, mask = batch
        found = (module(x)[:, 0] ** 2 * mask).sum() / mask.sum()
        return found, {"norm": found.detach() * 2, "rows": x[:, :2] * 2}

    options = {"backward_fn": lambda loss: scaler.scale(loss).backward()} if scaled else {}
    with monkeypatch.context() as patched, points:
        patched.setattr(
            torch.autograd, "backward", points.during("backward", torch.autograd.backward)
        )
        for has, name in ((WindowGradients, "prepare"), (Commit, "run")):
            patched.setattr(has, name, points.during("commit", getattr(has, name)))
        loss, aux = vb.backward(
            points.during("forward", loss_fn),
            batch,
            module=module,
            microbatch_size=size,
            weight=points.during("weight", lambda batch: batch[1].sum()),
            has_aux=True,
            **options,
        )
    left = [loss, aux["norm"], aux["rows"], *module.state_dict().values()]
    left += [parameter.grad for parameter in module.parameters()]
    return [*left, torch.get_rng_state()], points.seen


def drawn(monkeypatch, seed):
    """(size, case, the operation that fails, its phase) of a seed."""
    chance = random.Random(seed)
    size = chance.choice([24, 12, 8, 7, 5])
    half = chance.random() < 0.4
    case = (torch.bfloat16 if half else torch.float32, not half and chance.random() < 0.4)
    case += (chance.random() < 0.5,)
    _, seen = update(monkeypatch, size, case)
    phase = chance.choice([phase for phase in PHASES if phase in seen])
    return size, case, chance.choice([k for k, found in enumerate(seen) if found == phase]), phase


@pytest.mark.parametrize("seed", tiered(range(SEEDS), QUICK, "further points of the same phases"))
def test_any_operation_may_run_out(monkeypatch, seed):
    size, case, fail, _ = drawn(monkeypatch, seed)
    found, seen = update(monkeypatch, size, case, fail)
    assert len(seen) > fail + 1
    largest = -(-ROWS // -(-ROWS // size))
    due, _ = update(monkeypatch, largest // 2, case)
    for a, b in zip(found, due, strict=True):
        assert torch.equal(a, b)


@pytest.mark.thorough("it draws the points of all seeds")
def test_the_points_are_of_every_phase(monkeypatch):
    counted = Counter(drawn(monkeypatch, seed)[3] for seed in range(SEEDS))
    assert set(counted) == set(PHASES)
    assert min(counted.values()) >= 5, counted
    assert {drawn(monkeypatch, seed)[-1] for seed in QUICK} == set(PHASES)
