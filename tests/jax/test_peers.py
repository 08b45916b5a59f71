"""Cases that other accumulation loops get wrong, with the figures that are due.

Most use one-hot samples and a step of size 1, so that what a weight moved by is the part of the
update that its sample or token received. The names are those of the survey of peers; the cases
that every engine has stand in tests/conformance.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.jax.problems import MODES, in_mode
from tests.oracle import assert_close, tolerance
from tests.tiers import tiered

import virtualbatch.jax as vb


class OneHot:
    """A linear model in which sample i moves weight i alone."""

    def __init__(self, samples, optimizer=None, dtype="float64"):
        self.weights = jnp.zeros(samples, dtype)
        self.optimizer = optimizer or optax.sgd(1.0)
        self.state = self.optimizer.init(self.weights)

    def update(self, batch, loss=None, mode="eager", **options):
        """One update; what each weight moved by."""
        gradients = vb.value_and_grad(loss or (lambda w, rows: jnp.mean(rows @ w)), **options)
        found = in_mode(mode, gradients)(self.weights, batch)[1]
        changes, self.state = self.optimizer.update(found, self.state, self.weights)
        before, self.weights = self.weights, optax.apply_updates(self.weights, changes)
        return before - self.weights


def cut(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def test_f6_a_schedule_counts_updates():
    # Rate 1 for two updates, then 0. Peers read the schedule at 3, 7, 11 and never move.
    model = OneHot(1, optax.sgd(optax.piecewise_constant_schedule(1.0, {2: 0.0})))
    moved = [float(model.update(np.ones((4, 1)), accumulation_steps=4)[0]) for _ in range(4)]
    assert moved == [1.0, 1.0, 0.0, 0.0]


def test_f7_an_average_of_weights_takes_one_value_per_update():
    # Momentum 0.9: the weights are -1, -2, -3 after the updates. Peers average four times as often.
    model, average = OneHot(1), 0.0
    for _ in range(3):
        model.update(np.ones((4, 1)), accumulation_steps=4)
        average = optax.incremental_update(model.weights, average, 0.1)
    assert_close(average, [-0.561])
    # The same for an average of updates inside the optimizer.
    model = OneHot(1, optax.chain(optax.sgd(1.0), optax.ema(0.9, debias=False)))
    moved = [model.update(np.ones((4, 1)), accumulation_steps=4)[0] for _ in range(3)]
    assert_close(moved, [0.1, 0.19, 0.271])


@pytest.mark.parametrize("mode", MODES)
def test_f9_one_nan_spoils_its_own_window_only(mode):
    model = OneHot(1, optax.apply_if_finite(optax.sgd(1.0), 5))
    stream = [np.full((1, 1), value) for value in (1.0, np.nan, 1.0, 1.0, 1.0, 1.0)]
    moved = [
        float(model.update(window, mode=mode)[0])
        for window in vb.windows(stream, accumulation_steps=2)
    ]
    assert moved == [0.0, 1.0, 1.0]
    assert int(model.state.total_notfinite) == 1


def test_f10_a_stateful_optimizer_is_fed_once_per_window():
    batch = np.random.default_rng(0).normal(size=(8, 3))
    parts, whole = (OneHot(3, optax.adam(0.1)) for _ in range(2))
    for _ in range(3):
        parts.update(batch, accumulation_steps=4)
        whole.update(batch, microbatch_size=8)
    assert int(parts.state[0].count) == 3
    assert_close(parts.weights, whole.weights, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_r7_the_variance_of_a_batchnorm_has_the_part_between_micro_batches(mode):
    # Two micro-batches with means far apart; peers keep the mean of their variances, which is 1.
    x = np.array([[0.0], [2.0], [10.0], [12.0]])

    def loss(scale, x):
        mean, variance = x.mean(0), x.var(0)
        normalised = (x - mean) / jnp.sqrt(variance)
        return jnp.mean((scale * normalised) ** 2), {"mean": mean, "square": variance + mean**2}

    ours = vb.value_and_grad(loss, has_aux=True, microbatch_size=2)
    (_, aux), _ = in_mode(mode, ours)(np.ones(1), x)
    assert_close(aux["square"] - aux["mean"] ** 2, x.var(0), tolerance("float64", 16))


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same cut in a loop of Python"))
def test_a_virtual_batch_that_the_micro_batch_does_not_divide(mode):
    # 130 rows by micro-batches of 32: peers give the last two 13 times as much.
    assert_close(OneHot(130).update(np.eye(130), mode=mode, microbatch_size=32), [1 / 130] * 130)
