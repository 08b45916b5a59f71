"""Cases that other accumulation loops get wrong, with the figures that are due.

Most use one-hot samples and a step of size 1, so that what a weight moved by is the part of the
update that its sample or token received. The names are those of the survey of peers; the cases
that every engine has stand in tests/conformance.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_close
from tests.tensorflow.modes import compiled
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

MODES = ["eager", "static"]


class OneHot:
    """A linear model in which sample i moves weight i alone."""

    def __init__(self, samples, optimizer=None):
        self.weights = tf.Variable(np.zeros(samples))
        self.optimizer = optimizer or keras.optimizers.SGD(1.0)

    def mean(self, rows):
        """The mean over rows."""
        return tf.reduce_mean(tf.linalg.matvec(rows, self.weights))

    def update(self, batch, loss_fn=None, mode="eager", **options):
        """One update; what each weight moved by."""
        before = self.weights.numpy()
        loss_fn = loss_fn or self.mean

        def gradients(batch):
            return vb.value_and_gradients(loss_fn, batch, [self.weights], **options)[1]

        found = compiled(mode, gradients, batch)(batch)
        self.optimizer.apply_gradients(zip(found, [self.weights], strict=True))
        return before - self.weights.numpy()


def test_f6_a_schedule_counts_updates():
    # Rate 1 for two updates, then 0. Peers read the schedule at 3, 7, 11 and never move.
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([2], [1.0, 0.0])
    model = OneHot(1, keras.optimizers.SGD(rate))
    moved = [float(model.update(np.ones((4, 1)), accumulation_steps=4)[0]) for _ in range(4)]
    assert moved == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("mode", MODES)
def test_f9_one_nan_spoils_its_own_window_only(mode):
    model = OneHot(1)

    def guarded(window):
        before = model.weights.numpy()
        moved = model.update(window, mode=mode)
        if not np.isfinite(moved).all():
            model.weights.assign(before)
        return float(before[0] - model.weights.numpy()[0])

    stream = [np.full((1, 1), value) for value in (1.0, np.nan, 1.0, 1.0, 1.0, 1.0)]
    assert [guarded(window) for window in vb.windows(stream, accumulation_steps=2)] == [0, 1, 1]


def test_f10_a_stateful_optimizer_is_fed_once_per_window():
    batch = np.random.default_rng(0).normal(size=(8, 3))
    cut, whole = (OneHot(3, keras.optimizers.Adam(0.1)) for _ in range(2))
    for _ in range(3):
        cut.update(batch, accumulation_steps=4)
        whole.update(batch, microbatch_size=8)
    assert int(cut.optimizer.iterations) == 3
    assert_close(cut.weights, whole.weights, 1e-10)


@pytest.mark.parametrize(
    "mode", tiered(["eager", "static", "jit"], ["eager", "static"], "XLA takes seconds")
)
@pytest.mark.parametrize(
    "sizes", tiered([[1, 1, 1, 1], [2, 2, 1], [1, 2, 1]], [[2, 2, 1]], "further windows")
)
def test_r4_masks_differ_under_a_seed_too(mode, sizes):
    # Every trace of a graph draws the same numbers under a seed, wherever it is called.
    tf.random.set_seed(5)
    rows = tf.split(tf.ones([sum(sizes), 64]), sizes)
    variable = tf.Variable(1.0)

    def train(batch):
        def loss_fn(rows):
            mask = tf.cast(tf.random.uniform([1, 64]) < 0.5, tf.float32)
            return tf.reduce_mean(rows * mask * variable), rows * mask

        return vb.value_and_gradients(loss_fn, batch, [variable], has_aux=True)

    batch = vb.Window(rows)
    ((_, masks), _) = compiled(mode, train, batch)(batch)
    assert len(np.unique(masks.numpy(), axis=0)) == len(sizes)


@pytest.mark.parametrize("mode", tiered(MODES, ["eager"], "five graphs of 130 rows"))
def test_a_virtual_batch_that_the_micro_batch_does_not_divide(mode):
    # 650 samples in updates of 130 by micro-batches of 32: peers give the last two 13 times as
    # much, or drop the last ten.
    model = OneHot(650)
    for start in range(0, 650, 130):
        rows = np.eye(650)[start : start + 130]
        moved = model.update(rows, mode=mode, microbatch_size=32)
        assert_close(moved[start : start + 130], [1 / 130] * 130)
    assert_close(-model.weights.numpy(), [1 / 130] * 650)
    assert int(model.optimizer.iterations) == 5
