"""Whatever `fit` can read is cut alike."""

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from keras import layers
from tests.keras import problems
from tests.keras.problems import X, compiled
from tests.keras.training import BATCH, Case, assert_equals_keras, names

LABELS, WEIGHTS = problems.LABELS, problems.ROW_WEIGHTS


def batches():
    for start in range(0, len(X), BATCH):
        rows = slice(start, start + BATCH)
        yield X[rows], LABELS[rows], WEIGHTS[rows]


def endless():
    while True:
        yield from batches()


class Pages(keras.utils.PyDataset):
    """The same batches by number."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return list(batches())[index]


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


CASES = [
    Case("frames", problems.classifier, compiled(), pd.DataFrame(X), pd.Series(LABELS),
         {"sample_weight": pd.Series(WEIGHTS)}),
    Case("a frame of targets", problems.classifier, compiled(loss="mse", metrics=["mae"]),
         pd.DataFrame(X), pd.DataFrame(X[:, :3])),
    Case("tf.data.Dataset", problems.classifier, compiled(), dataset),
    Case("tf.data.Dataset of small batches", problems.classifier, compiled(),
         small_batches_regrouped),
    Case("rows known when traced", problems.classifier, compiled(),
         lambda: rows().batch(BATCH, drop_remainder=True)),
    Case("generator", problems.classifier, compiled(), endless, None, {"steps_per_epoch": 3}),
    Case("PyDataset", problems.classifier, compiled(), lambda: Pages()),
    Case("text", reads_words, compiled(), words),
    Case("validation_split", problems.classifier, compiled(), X, LABELS,
         {"validation_split": 0.3}),
    Case("validation_data", problems.classifier, compiled(), X, LABELS,
         {"validation_data": (X[:40], LABELS[:40]), "validation_batch_size": 17,
          "validation_freq": 2}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_equals_keras(case):
    assert_equals_keras(case)


def test_shuffled_rows_equal_keras():
    case = Case("", problems.classifier, compiled(), X, LABELS, {"shuffle": True})
    assert_equals_keras(case)
