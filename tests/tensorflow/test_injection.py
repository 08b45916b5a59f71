"""Memory that runs out at any operation of an eager window: 100 points of 100 give the same result.

Every operation that makes a tensor may be the one that gets no memory, whether the loss, the
backward pass or the sum of the gradients asks for it.
"""

import random
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import op_callbacks
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

ROWS = 24
SEEDS = 100
# One of each phase.
QUICK = (0, 1, 3, 4)
PHASES = ("weight", "forward", "backward", "accumulate")


class Operations:
    """Notes the phase of each operation, and lets one of them run out."""

    def __init__(self, fail=None):
        self.fail = fail
        self.phase = "accumulate"
        self.seen = []

    def __call__(self, op_type, inputs, attrs, outputs, op_name=None, graph=None):
        # Aux is told apart by an abstract trace, which needs no memory.
        if graph is None and outputs:
            self.seen.append(self.phase)
            if len(self.seen) - 1 == self.fail:
                text = "OOM when allocating tensor with shape[64,1048576] and type float on CPU:0"
                raise tf.errors.ResourceExhaustedError(None, None, text)

    def during(self, phase, run):
        def marked(*args, **kwargs):
            before, self.phase = self.phase, phase
            try:
                return run(*args, **kwargs)
            finally:
                self.phase = before

        return marked


def window(monkeypatch, size, fail=None):
    """What a window gives, and the phases of its operations."""
    rng = np.random.default_rng(0)
    table, kernel = tf.Variable(rng.normal(size=(7, 5))), tf.Variable(rng.normal(size=(5,)))
    batch = {
        "ids": tf.constant(rng.integers(0, 7, ROWS)),
        "mask": tf.constant((rng.uniform(size=ROWS) < 0.7).astype(float)),
    }

    def loss_fn(batch):
        hidden = tf.tanh(tf.gather(table, batch["ids"]))
        errors = tf.linalg.matvec(hidden, kernel) ** 2
        tokens = tf.reduce_sum(errors * batch["mask"]) / tf.reduce_sum(batch["mask"])
        return {"tokens": tokens, "penalty": tf.reduce_sum(kernel**2)}, errors

    def weight(batch):
        return {"tokens": tf.reduce_sum(batch["mask"]), "penalty": None}

    points = Operations(fail)
    op_callbacks.add_op_callback(points)
    try:
        with monkeypatch.context() as patched:
            gradient = points.during("backward", tf.GradientTape.gradient)
            patched.setattr(tf.GradientTape, "gradient", gradient)
            (loss, aux), gradients = vb.value_and_gradients(
                points.during("forward", loss_fn),
                batch,
                [table, kernel],
                weight=points.during("weight", weight),
                has_aux=True,
                microbatch_size=size,
            )
    finally:
        op_callbacks.remove_op_callback(points)
    return [x.numpy() for x in (loss, aux, *map(tf.convert_to_tensor, gradients))], points.seen


def drawn(monkeypatch, seed):
    """(size, the operation that fails, its phase) of a seed."""
    chance = random.Random(seed)
    size = chance.choice([24, 12, 8, 7, 5])
    _, seen = window(monkeypatch, size)
    phase = chance.choice([phase for phase in PHASES if phase in seen])
    return size, chance.choice([k for k, found in enumerate(seen) if found == phase]), phase


@pytest.mark.parametrize("seed", tiered(range(SEEDS), QUICK, "further points of the same phases"))
def test_any_operation_may_run_out(monkeypatch, seed):
    size, fail, _ = drawn(monkeypatch, seed)
    found, seen = window(monkeypatch, size, fail)
    assert len(seen) > fail + 1
    largest = -(-ROWS // -(-ROWS // size))
    due, _ = window(monkeypatch, largest // 2)
    for a, b in zip(found, due, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thorough("it draws the points of all seeds")
def test_the_points_are_of_every_phase(monkeypatch):
    counted = Counter(drawn(monkeypatch, seed)[2] for seed in range(SEEDS))
    assert set(counted) == set(PHASES)
    assert min(counted.values()) >= 5, counted
    assert {drawn(monkeypatch, seed)[-1] for seed in QUICK} == set(PHASES)
