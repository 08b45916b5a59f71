"""A micro-batch without weight while TensorFlow itself searches for NaN, eagerly."""

import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_close

import virtualbatch.tensorflow as vb

# The second micro-batch counts nothing.
BATCH = (tf.constant([1.0, 2.0, 3.0, 4.0], tf.float64), tf.constant([1.0, 1, 0, 0], tf.float64))


@pytest.fixture
def checked():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


def gradient(divide, weight=lambda batch: tf.reduce_sum(batch[1]), batch=BATCH):
    variable = tf.Variable(np.float64(1))

    def loss_fn(batch):
        values, mask = batch
        return divide(tf.reduce_sum(values * mask) * variable, tf.reduce_sum(mask))

    (found,) = vb.value_and_gradients(loss_fn, batch, [variable], microbatch_size=2, weight=weight)[
        1
    ]
    return found


def test_a_mean_of_nothing_is_explained(checked):
    with pytest.raises(ValueError, match=r"Got NaN in micro-batch 1, whose weight is 0\. Divide"):
        gradient(tf.divide)


def test_the_advice_holds(checked):
    assert_close(gradient(tf.math.divide_no_nan), 1.5, 1e-15)


@pytest.mark.parametrize("weight", [None, lambda batch: 2.0])
def test_nan_where_something_counts_stays_tensorflows(checked, weight):
    with pytest.raises(tf.errors.InvalidArgumentError, match="Detected Infinity or NaN"):
        gradient(tf.divide, weight)


def test_without_the_search_nothing_is_raised():
    assert_close(gradient(tf.divide), 1.5, 1e-15)
