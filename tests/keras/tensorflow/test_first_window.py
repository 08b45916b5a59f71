"""The first window of what draws by TensorFlow."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import virtualbatch.keras as vb

pytestmark = pytest.mark.proves_itself

X = np.random.default_rng(0).normal(size=(12, 6))


class Noise(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x), dtype=x.dtype)


def test_what_draws_cannot_be_tried_and_draws_as_before(caplog):
    def trained(check):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([layers.Dense(4), Noise(), layers.Dense(2)])
        model.compile("sgd", "mse", run_eagerly=True)
        vb.accumulate(model, microbatch_size=4, check=check)
        model.train_on_batch(X, X[:, :2])
        return model.get_weights(), tf.random.uniform((3,)).numpy()

    proven = trained(True)
    (line,) = [line for line in caplog.messages if "tried" in line]
    assert "the same rows give a different result each time" in line
    plain = trained(False)
    np.testing.assert_array_equal(proven[0][0], plain[0][0])
    np.testing.assert_array_equal(proven[1], plain[1])


def absolute(y_true, y_pred):
    return tf.reduce_mean(tf.abs(tf.cast(y_true, y_pred.dtype) - y_pred))


def test_texts_are_tried_and_rows_of_many_lengths_are_not(caplog):
    words = layers.StringLookup(vocabulary=["a", "b"])
    texts = tf.constant([["a"], ["b"], ["c"]] * 4)
    lengths = tf.RaggedTensor.from_row_lengths(np.ones(18), [1, 2] * 6)
    targets = np.arange(12.0)[:, None]
    for inputs, first, expected in (
        (texts, [words, layers.Embedding(3, 2), layers.Flatten()], 0),
        (lengths, [layers.Lambda(lambda x: tf.reduce_sum(x, 1, keepdims=True))], 1),
    ):
        model = keras.Sequential([*first, layers.Dense(1)])
        model.compile("sgd", absolute, run_eagerly=True)
        vb.accumulate(model, microbatch_size=4)
        model.fit(inputs, targets, batch_size=12, verbose=0)
        tried = [line for line in caplog.messages if "tried" in line]
        assert ["(its rows differ in length)" in line for line in tried] == [True] * expected
