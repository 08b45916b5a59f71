"""Ragged rows and `tf.recompute_grad`, which only TensorFlow has."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tests.keras import problems
from tests.keras.problems import FEATURES, WORDS, X, compiled
from tests.keras.training import BATCH, ROWS, Case, assert_equals_keras, in_tiers

LABELS = problems.LABELS


class RaggedMean(keras.Model):
    """Reads the parts of a ragged tensor, which no symbolic tensor has."""

    def __init__(self):
        super().__init__()
        self.words, self.out = layers.Embedding(WORDS, 4), layers.Dense(3)

    def call(self, inputs):
        words = self.words(inputs.values)
        return self.out(tf.math.segment_mean(words, inputs.value_rowids()))


def ragged_rows():
    flat = problems.WORD_IDS.ravel()[: 3 * ROWS]
    sentences = tf.RaggedTensor.from_row_lengths(flat, np.tile([1, 5, 3, 2, 4], ROWS // 5))
    return tf.data.Dataset.from_tensor_slices((sentences, LABELS)).batch(BATCH)


def ragged_functional():
    inputs = keras.Input((None,), dtype="int32", ragged=True)
    return keras.Model(
        inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(layers.Embedding(WORDS, 4)(inputs)))
    )


class Recomputed(layers.Layer):
    """Keeps no activation of its hidden layer: the backward pass computes it again."""

    def build(self, shape):
        self.hidden = layers.Dense(4, activation="tanh")
        self.hidden.build(shape)

    def call(self, inputs):
        return tf.recompute_grad(self.hidden)(inputs)


def recomputed():
    return keras.Sequential([keras.Input((FEATURES,)), Recomputed(), layers.Dense(3)])


class AddsRaggedRows(RaggedMean):
    """Adds one loss per row."""

    def call(self, inputs):
        logits = super().call(inputs)
        self.add_loss(tf.square(logits[:, 0]))
        return logits


RECOMPUTED = Case("recompute_grad", recomputed, compiled(), X, LABELS)
CASES = [
    Case("ragged", ragged_functional, compiled(), ragged_rows),
    Case("ragged, subclassed", RaggedMean, compiled(), ragged_rows),
    Case("ragged, added losses of rows", AddsRaggedRows, compiled(), ragged_rows),
]


@pytest.mark.parametrize(
    "case", in_tiers([RECOMPUTED, CASES[0]], CASES[1:], "another model of ragged rows")
)
def test_equals_keras(case):
    assert_equals_keras(case)
