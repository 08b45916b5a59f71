"""Half precision: the buffer is wide, the share enters there, and one rounding ends it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import EPSILON, assert_all_close, assert_close, tolerance
from tests.tensorflow.modes import arrays, compiled, uncut
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

HALF = ["bfloat16", "float16"]


def test_a_sum_of_ones_in_half_precision_stalls():
    # Why the buffer is wide: without it the tests below would see 0.25 and 0.5.
    for dtype, stalls in (("bfloat16", 256), ("float16", 2048)):
        one = total = np.ones([], tf.as_dtype(dtype).as_numpy_dtype)
        for _ in range(4095):
            total = total + one
        assert float(total) == stalls


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "way",
    tiered(
        [("eager", 600), ("static", 1024), ("static", 4096), ("dynamic", 4096), ("jit", 4096)],
        [("eager", 600), ("dynamic", 4096)],
        "further programs",
    ),
    ids=str,
)
def test_unit_gradients_of_any_number_of_micro_batches(way, dtype):
    mode, microbatches = way
    # Peer case F12.
    variable = tf.Variable(tf.ones([], dtype))

    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.reduce_mean(x * variable), x, [variable], microbatch_size=1
        )

    x = tf.ones([microbatches], dtype)
    loss, (gradient,) = compiled(mode, train, x)(x)
    assert (float(loss), float(gradient)) == (1.0, 1.0)
    assert loss.dtype == gradient.dtype == dtype


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_narrow_loss_of_a_wide_variable(dtype, mode):
    # The share of a third would be off by 2e-3 in bfloat16, the same way for every micro-batch.
    variable = tf.Variable(1.0)

    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.reduce_mean(tf.cast(x * variable, dtype)),
            x,
            [variable],
            microbatch_size=1,
        )

    x = tf.ones([3])
    loss, (gradient,) = compiled(mode, train, x)(x)
    assert_close(gradient, 1.0, tolerance("float32", 3))
    assert loss.dtype == dtype
    assert gradient.dtype == tf.float32


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_a_small_share_does_not_underflow(mode):
    # 2 ** -12 of 2 ** -13 is below the smallest float16.
    variable = tf.Variable(tf.ones([], tf.float16))
    tiny = tf.constant(2.0**-13, tf.float16)
    weights = tf.constant([1.0, 2.0**12 - 1])

    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.cast(x[0], tf.float16) * 0 + variable * tiny,
            x,
            [variable],
            microbatch_size=1,
            weight=lambda x: x[0],
        )

    _, (gradient,) = compiled(mode, train, weights)(weights)
    assert float(gradient) == 2.0**-13

    _, (gradient,) = vb.value_and_gradients(
        lambda x: variable * tiny * tf.cast(x[0] > 0, tf.float16),
        tf.constant([1.0] + [0.0] * 15),
        [variable],
        microbatch_size=1,
    )
    assert float(gradient) == 2.0**-17


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("dtype", HALF)
def test_the_result_is_rounded_once(dtype, mode):
    variable = tf.Variable(tf.ones([50], dtype))
    x = tf.cast(np.random.default_rng(0).normal(size=(90, 50)), dtype)

    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.reduce_sum(x * variable), x, [variable], microbatch_size=1
        )

    _, (gradient,) = compiled(mode, train, x)(x)
    exact = x.numpy().astype(np.float64).mean(0)
    off = np.abs(gradient.numpy().astype(np.float64) - exact)
    # Half a unit in the last place, and the rounding of the float32 buffer.
    allowed = EPSILON[dtype] / 2 * np.abs(exact) + tolerance("float32", 90) * 4
    assert (off <= allowed).all()


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("dtype", HALF)
def test_terms_of_different_weights(dtype, mode):
    variable = tf.Variable(tf.ones([], dtype))
    weights = tf.constant([[1.0, 3], [2, 1], [5, 7], [1, 0]] * 50, tf.float64)

    def loss_fn(weights):
        one = tf.cast(tf.reduce_mean(weights) * 0 + 1, dtype)
        return {"a": variable * one, "b": 2 * variable * one}

    def train(weights):
        return vb.value_and_gradients(
            loss_fn,
            weights,
            [variable],
            microbatch_size=1,
            weight=lambda w: {"a": w[0, 0], "b": w[0, 1]},
        )

    loss, (gradient,) = compiled(mode, train, weights)(weights)
    # The ratio of the shares is rounded in the backward pass, the sum in the end.
    assert_close([float(loss), float(gradient)], [3.0, 3.0], EPSILON[dtype])


def test_a_negative_share_that_is_the_largest_does_not_overflow():
    # The share of `a` in the second micro-batch is 7e6 times that of `b`, and negative.
    variable = tf.Variable(tf.ones([], tf.float16))
    weights = tf.constant([[-(2.0**17), 1], [1, 1e-12]], tf.float64)

    @tf.function
    def train(weights):
        return vb.value_and_gradients(
            lambda weights: {"a": variable * 1, "b": variable * 2},
            weights,
            [variable],
            microbatch_size=1,
            weight=lambda w: {"a": w[0, 0], "b": w[0, 1]},
        )

    loss, (gradient,) = train(weights)
    assert_close([float(loss), float(gradient)], [3.0, 3.0], EPSILON["float16"])


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_each_gradient_has_the_dtype_of_its_variable(mode):
    dtypes = ["bfloat16", "float16", "float32", "float64"]
    variables = [tf.Variable(tf.ones([], dtype)) for dtype in dtypes]

    def train(x):
        return vb.value_and_gradients(
            lambda x: tf.reduce_mean(x) * tf.add_n([tf.cast(v, tf.float64) for v in variables]),
            x,
            variables,
            microbatch_size=2,
        )

    x = tf.constant([1.0, 2, 6], tf.float64)
    _, gradients = compiled(mode, train, x)(x)
    assert [gradient.dtype.name for gradient in gradients] == dtypes
    assert [float(gradient) for gradient in gradients[:2]] == [3.0, 3.0]
    assert_close(gradients[3], 3.0, tolerance("float32", 3))


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_a_keras_model_under_mixed_float16(mode):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(4, activation="tanh", dtype="mixed_float16"),
        keras.layers.Dense(1, dtype="mixed_float16"),
    ]
    model = keras.Sequential(layers)
    model.build((None, 3))
    random = np.random.default_rng(0)
    batch = (
        tf.constant(random.normal(size=(10, 3)), tf.float32),
        tf.constant(random.normal(size=(10, 1)), tf.float32),
    )

    def loss_fn(batch):
        x, y = batch
        return tf.reduce_mean((tf.cast(model(x), tf.float32) - y) ** 2)

    def train(batch):
        return vb.value_and_gradients(loss_fn, batch, model.trainable_variables, microbatch_size=4)

    _, gradients = compiled(mode, train, batch)(batch)
    expected = uncut(loss_fn, batch, model.trainable_variables)[1]
    assert_all_close(arrays(gradients), expected, tolerance("float16", 10))
    assert {gradient.dtype for gradient in gradients} == {tf.float32}
