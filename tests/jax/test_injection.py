"""Memory that runs out at any operation of an un-jitted window: 100 points of 100 give the same.

Every primitive that JAX runs may be the one that gets no memory, whether the loss, the backward
pass or the sum of the gradients asks for it.
"""

import random
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax._src.core import EvalTrace
from tests.tiers import tiered

import virtualbatch.jax as vb
from virtualbatch.jax import _eager
from virtualbatch.jax._objective import Call

ROWS = 24
SEEDS = 100
# One of each phase.
QUICK = (0, 1, 6, 13)
PHASES = ("weight", "forward", "backward", "accumulate")


class Operations:
    """Notes the phase of each primitive that runs, and lets one of them run out."""

    def __init__(self, fail=None):
        self.fail = fail
        self.phase = None
        self.seen = []

    def point(self):
        if self.phase is not None:
            self.seen.append(self.phase)
            if len(self.seen) - 1 == self.fail:
                raise jax.errors.JaxRuntimeError(
                    "RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes."
                )

    def during(self, phase, run, after=None, counts=False):
        def marked(*args, **kwargs):
            before, self.phase = self.phase, phase
            try:
                if counts:
                    # JAX calls its compiled functions out of C++, where nobody can count.
                    self.point()
                return run(*args, **kwargs)
            finally:
                self.phase = after or before

        return marked


def window(monkeypatch, size, dtype, fail=None):
    """What a window gives, and the phases of its operations."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": jax.random.normal(keys[0], (6, 16), dtype),
        "last": jax.random.normal(keys[1], (16,), dtype),
    }
    batch = {
        "x": jax.random.normal(keys[2], (ROWS, 6), dtype),
        "mask": jax.random.bernoulli(keys[3], 0.7, (ROWS,)).astype(dtype),
    }
    points = Operations(fail)

    def loss(params, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["first"])
        hidden = hidden * jax.random.bernoulli(key, 0.6, hidden.shape)
        errors = (hidden @ params["last"]) ** 2
        return (errors * batch["mask"]).sum() / batch["mask"].sum(), errors

    process = EvalTrace.process_primitive

    def processed(trace, *args):
        points.point()
        return process(trace, *args)

    with monkeypatch.context() as patched:
        patched.setattr(EvalTrace, "process_primitive", processed)
        # What is left of a micro-batch once its loss is known is the backward pass.
        patched.setattr(Call, "gradients", points.during("forward", Call.gradients))
        added = points.during("accumulate", _eager._accumulated, counts=True)
        patched.setattr(_eager, "_accumulated", added)
        result = vb.value_and_grad(
            points.during("forward", loss, after="backward"),
            has_aux=True,
            weight=points.during("weight", lambda batch: batch["mask"].sum(), counts=True),
            key_argnum=2,
            microbatch_size=size,
        )(params, batch, jax.random.key(7))
    return jax.tree.leaves(result), points.seen


def drawn(monkeypatch, seed):
    """(size, dtype, the operation that fails, its phase) of a seed."""
    chance = random.Random(seed)
    size = chance.choice([24, 12, 8, 7, 5])
    dtype = chance.choice([jnp.float32, jnp.bfloat16])
    _, seen = window(monkeypatch, size, dtype)
    phase = chance.choice([phase for phase in PHASES if phase in seen])
    return size, dtype, chance.choice([k for k, found in enumerate(seen) if found == phase]), phase


@pytest.mark.parametrize("seed", tiered(range(SEEDS), QUICK, "further points of the same phases"))
def test_any_operation_may_run_out(monkeypatch, seed):
    size, dtype, fail, _ = drawn(monkeypatch, seed)
    found, seen = window(monkeypatch, size, dtype, fail)
    assert len(seen) > fail + 1
    largest = -(-ROWS // -(-ROWS // size))
    due, _ = window(monkeypatch, largest // 2, dtype)
    for a, b in zip(found, due, strict=True):
        assert (a == b).all()


@pytest.mark.thorough("it draws the points of all seeds")
def test_the_points_are_of_every_phase(monkeypatch):
    counted = Counter(drawn(monkeypatch, seed)[3] for seed in range(SEEDS))
    assert set(counted) == set(PHASES)
    assert min(counted.values()) >= 5, counted
    assert {drawn(monkeypatch, seed)[-1] for seed in QUICK} == set(PHASES)
