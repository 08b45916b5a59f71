"""Cases that other accumulation loops get wrong in Keras, with the figures that are due.

Samples are one-hot and the step is of size 1, so that what a weight moved by is the part of the
update that its sample or token received. The names are those of the survey of peers.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras.backends import modes
from tests.oracle import assert_close

import virtualbatch.keras as vb

optimizers = keras.optimizers
schedules = keras.optimizers.schedules


def prediction(y_true, y_pred):
    """A loss whose gradient is the input: one value per row or token."""
    return y_pred[..., 0]


def one_hot(samples, optimizer=None, loss=prediction, microbatch_size=1, **options):
    """A linear model in which sample i moves weight i alone."""
    outputs = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((samples,)), outputs])
    model.compile(optimizer or optimizers.SGD(1.0), loss, **options)
    vb.accumulate(model, microbatch_size=microbatch_size)
    return model


def fit(model, x, y=None, **options):
    """Trains in order; returns how far each weight of the last layer moved."""
    before = model.layers[-1].kernel.numpy().ravel()
    y = np.zeros(len(x)) if y is None else y
    model.fit(x, y, verbose=0, shuffle=False, **options)
    return before - model.layers[-1].kernel.numpy().ravel()


def masked_tokens(samples, optimizer=None):
    """The same for tokens: rows of one-hot tokens, in which a token of zeros is masked."""
    outputs = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((None, samples)), layers.Masking(), outputs])
    model.compile(optimizer or optimizers.SGD(1.0), prediction)
    return model


def test_f1_every_token_counts_once():
    # Two micro-batches of 2 x 4 tokens, 7 valid and 1 valid. Keras gives the lone token 4 times.
    tokens = np.eye(16).reshape(4, 4, 16)
    valid = np.ones((4, 4))
    valid[1, 3] = valid[2, :] = valid[3, 1:] = 0
    model = masked_tokens(16)
    vb.accumulate(model, microbatch_size=2)
    moved = fit(model, tokens * valid[..., None], np.zeros((4, 4, 1)), batch_size=4)
    assert_close(moved, valid.ravel() / 8)


def test_f2_f3_a_short_last_batch_is_an_update_of_its_own():
    # Ten samples, batches of 8, micro-batches of 4, two epochs. Keras carries the last two over.
    moved = fit(one_hot(10, microbatch_size=4), np.eye(10), batch_size=8, epochs=2)
    assert_close(moved, 2 * np.array([1 / 8] * 8 + [1 / 2] * 2))


@pytest.mark.parametrize(
    "microbatch_size",
    [3, *(pytest.param(n, marks=pytest.mark.thorough("another size")) for n in (8, 4, 2))],
)
def test_f4_a_term_of_weights_counts_once(microbatch_size):
    # 0.1 v^2 at v = 1 has gradient 0.2, whatever the number of micro-batches.
    class Term(layers.Layer):
        def build(self, shape):
            self.v = self.add_weight(shape=(), initializer="ones")

        def call(self, inputs):
            self.add_loss(0.1 * self.v**2)
            return inputs

    term = Term()
    outputs = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((8,)), term, outputs])
    model.compile(optimizers.SGD(1.0), prediction)
    vb.accumulate(model, microbatch_size=microbatch_size)
    assert_close(fit(model, np.eye(8), batch_size=8), np.full(8, 1 / 8))
    assert_close(term.v.numpy(), 0.8)


@pytest.mark.thorough("by figures what cases of other files compare with plain Keras")
@pytest.mark.parametrize(("reduction", "due"), [("sum", 1.0), ("sum_over_batch_size", 1 / 8)])
def test_f5_no_factor_of_the_number_of_micro_batches(reduction, due):
    class Prediction(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return y_pred[..., 0]

    model = one_hot(8, loss=Prediction(reduction=reduction), microbatch_size=2)
    assert_close(fit(model, np.eye(8), batch_size=8), np.full(8, due))


@pytest.mark.thorough("by figures what cases of other files compare with plain Keras")
def test_f6_a_schedule_counts_updates():
    # Rate 1 for updates 0, 1 and 2, then 0. Keras reads the schedule at 3 first and never moves.
    rate = schedules.PiecewiseConstantDecay([2], [1.0, 0.0])
    model = one_hot(1, optimizers.SGD(rate))
    assert_close(fit(model, np.ones((20, 1)), batch_size=4), [3.0])


@pytest.mark.thorough("by figures what cases of other files compare with plain Keras")
def test_f7_one_average_per_update():
    # The weight is -1, -2, -3; its average -1, -1.1, -1.29.
    optimizer = optimizers.SGD(1.0, use_ema=True, ema_momentum=0.9)
    model = one_hot(1, optimizer)
    fit(model, np.ones((12, 1)), batch_size=4)
    assert_close(optimizer._model_variables_moving_average[0].numpy(), [[-1.29]])


@pytest.mark.parametrize(
    "mode",
    [{}, pytest.param({"run_eagerly": True}, marks=pytest.mark.thorough("the same, run eagerly"))],
    ids=str,
)
def test_f9_one_nan_skips_one_window(mode):
    optimizer = optimizers.LossScaleOptimizer(optimizers.SGD(1.0), initial_scale=8.0)
    model = one_hot(1, optimizer, **mode)
    moved = fit(model, np.array([[1.0], [np.nan], [1], [1], [1], [1]]), batch_size=2)
    assert_close(moved, [2.0])
    assert int(optimizer.iterations) == 2
    assert float(optimizer.dynamic_scale) == 4.0


@pytest.mark.thorough("by figures what cases of other files compare with plain Keras")
@pytest.mark.parametrize("mode", modes(), ids=str)
@pytest.mark.parametrize(
    ("ids", "due"),
    [
        # Row 0 in the first micro-batch; rows 0 and 1, or row 0 twice, in the second.
        ([[0, 0], [0, 1]], [-1.5 / 2, -0.5 / 2, 0.0]),
        ([[0, 0], [0, 0]], [-1.0, 0.0, 0.0]),
    ],
)
def test_f10_rows_of_an_embedding(ids, due, mode):
    words = layers.Embedding(3, 1, embeddings_initializer="zeros")
    model = keras.Sequential([keras.Input((2,), dtype="int32"), words])
    model.compile(optimizers.SGD(1.0), lambda y_true, y_pred: ops.mean(y_pred[..., 0], -1), **mode)
    vb.accumulate(model, microbatch_size=1)
    model.fit(np.array(ids), np.zeros(2), batch_size=2, verbose=0, shuffle=False)
    assert_close(words.embeddings.numpy().ravel(), due)


def test_r7_batchnorm_counts_the_spread_between_micro_batches():
    # Micro-batches (0, 0) and (2, 2) have variance 0 each; the batch has mean 1 and variance 1.
    norm = layers.BatchNormalization(momentum=0.5)
    outputs = layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), norm, outputs])
    model.compile(optimizers.SGD(1.0), prediction)
    vb.accumulate(model, microbatch_size=2)
    fit(model, np.array([[0.0], [0.0], [2.0], [2.0]]), batch_size=4)
    assert_close(norm.moving_mean.numpy(), [0.5 * 0 + 0.5 * 1])
    assert_close(norm.moving_variance.numpy(), [0.5 * 1 + 0.5 * 1])


@pytest.mark.thorough("by figures what cases of other files compare with plain Keras")
def test_r7_gradient_of_gamma_is_that_of_replicas():
    # Rows (0, 2) and (10, 14): each pair is normalised to -1 and 1 (without epsilon).
    norm = layers.BatchNormalization(epsilon=0.0)
    model = keras.Sequential([keras.Input((1,)), norm])
    model.compile(optimizers.SGD(1.0), "mse")
    vb.accumulate(model, microbatch_size=2)
    y = np.array([3.0, 5.0, 7.0, 1.0])
    model.fit(np.array([[0.0], [2.0], [10.0], [14.0]]), y, batch_size=4, verbose=0, shuffle=False)
    normalised = np.array([-1.0, 1.0, -1.0, 1.0])
    assert_close(norm.gamma.numpy(), [1 - np.mean(2 * (normalised - y) * normalised)])
    assert_close(norm.beta.numpy(), [-np.mean(2 * (normalised - y))])


def test_r10_weights_divide_once_per_window():
    # Keras' own accumulation gives 0.25 each: every micro-batch by its own weights.
    class Prediction(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return y_pred[..., 0]

    model = one_hot(4, loss=Prediction(reduction="mean_with_sample_weight"), microbatch_size=2)
    weights = np.array([3.0, 3.0, 1.0, 1.0])
    moved = fit(model, np.eye(4), batch_size=4, sample_weight=weights)
    assert_close(moved, weights / 8)


def test_r10_two_outputs_have_a_mask_each():
    # Tokens 1 2 | 3 of the first output, 1 | 2 3 of the second: each counts a third.
    def tokens(valid):
        return np.eye(4).reshape(2, 2, 4) * np.array(valid).reshape(2, 2, 1)

    inputs = [keras.Input((2, 4)), keras.Input((2, 4))]
    heads = [layers.Dense(1, use_bias=False, kernel_initializer="zeros") for _ in inputs]
    outputs = [head(layers.Masking()(x)) for head, x in zip(heads, inputs, strict=True)]
    model = keras.Model(inputs, outputs)
    model.compile(optimizers.SGD(1.0), [prediction, prediction])
    vb.accumulate(model, microbatch_size=1)
    valid = [[1, 1, 1, 0], [1, 0, 1, 1]]
    x = [tokens(found) for found in valid]
    model.fit(x, [np.zeros((2, 2, 1))] * 2, batch_size=2, verbose=0, shuffle=False)
    for head, found in zip(heads, valid, strict=True):
        assert_close(-head.kernel.numpy().ravel(), np.array(found) / 3)


@pytest.mark.parametrize(
    "epochs", [1, pytest.param(2, marks=pytest.mark.thorough("the same once more"))]
)
def test_batches_of_130_by_32_count_every_sample_once(epochs):
    # 650 samples; Keras' own accumulation loses ten, and weighs those of a short piece 13 times.
    model = one_hot(650, microbatch_size=32)
    moved = fit(model, np.eye(650), batch_size=130, epochs=epochs)
    assert_close(moved, np.full(650, epochs / 130))
    assert int(model.optimizer.iterations) == 5 * epochs
