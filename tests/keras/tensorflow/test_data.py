"""What `fit` reads through tf.data is cut alike."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tests.keras import problems
from tests.keras.problems import X, compiled
from tests.keras.training import BATCH, Case, assert_equals_keras, in_tiers

LABELS, WEIGHTS = problems.LABELS, problems.ROW_WEIGHTS


def rows():
    return tf.data.Dataset.from_tensor_slices((X, LABELS, WEIGHTS))


def dataset():
    return rows().batch(BATCH)


def small_batches_regrouped():
    regrouped = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(32).rebatch(BATCH)
    # TensorFlow no longer knows how many there are, and Keras warns when they end.
    return regrouped.apply(tf.data.experimental.assert_cardinality(3))


def words():
    return tf.data.Dataset.from_tensor_slices(
        (np.array(list("abcde"))[problems.WORD_IDS[:, 0]], LABELS)
    ).batch(BATCH)


def reads_words():
    inputs = keras.Input((), dtype="string")
    ids = layers.StringLookup(vocabulary=list("abcd"))(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Embedding(5, 4)(ids)))


REASON = "another way to the same batches"

CASES = [
    Case("tf.data.Dataset", problems.classifier, compiled(), dataset),
    Case("rows known when traced", problems.classifier, compiled(),
         lambda: rows().batch(BATCH, drop_remainder=True)),
    Case("text", reads_words, compiled(), words),
]  # fmt: skip

FURTHER = [
    Case("tf.data.Dataset of small batches", problems.classifier, compiled(),
         small_batches_regrouped),
]  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case)
