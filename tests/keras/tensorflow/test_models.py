"""Ragged rows, which only TensorFlow has."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tests.keras import problems
from tests.keras.problems import WORDS, compiled
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


CASES = [
    Case("ragged", ragged_functional, compiled(), ragged_rows),
    Case("ragged, subclassed", RaggedMean, compiled(), ragged_rows),
]


@pytest.mark.parametrize("case", in_tiers(CASES[:1], CASES[1:], "another model of ragged rows"))
def test_equals_keras(case):
    assert_equals_keras(case)
