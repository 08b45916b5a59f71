"""What is refused of tf.data and tf.distribute, traced or not, with which words."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tests.keras import problems
from tests.keras.problems import FEATURES, X, crossentropy
from tests.keras.test_refusals import (
    BOTH,
    DISAGREE,
    SHORT,
    assert_refused,
    compiled_model,
    fit,
    generated,
)

import virtualbatch.keras as vb

LABELS = problems.LABELS


def as_known_dataset(x, y):
    return tf.data.Dataset.from_tensors((x, y))


def as_open_dataset(x, y):
    def open_rows(array):
        return tf.TensorSpec([None, *array.shape[1:]], array.dtype)

    return tf.data.Dataset.from_generator(
        generated(x, y), output_signature=(open_rows(x), open_rows(y))
    )


TRAINING = {
    "rows differ, known": (
        {"microbatch_size": 8}, {}, fit(lambda: as_known_dataset(*SHORT)),
        "Got 20 rows in batch[0] and 19 rows in batch[1]",
    ),
    "rows differ, eager": (
        {"microbatch_size": 8}, {"run_eagerly": True},
        fit(lambda: as_open_dataset(*SHORT), steps_per_epoch=1),
        "Got 20 rows in batch[0] and 19 rows in batch[1]",
    ),
    "rows differ, known when they come": (
        {"microbatch_size": 8}, {},
        fit(lambda: as_open_dataset(*SHORT), steps_per_epoch=1),
        "Got 20 rows in batch[0] and 19 rows in batch[1]",
    ),
    "sizes disagree, steps_per_execution": (
        BOTH, {"steps_per_execution": 2},
        lambda model: model.fit(X, LABELS, batch_size=50, verbose=0), DISAGREE,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sizes", "mode", "act", "text"), TRAINING.values(), ids=TRAINING)
def test_batches_that_are_refused(sizes, mode, act, text):
    assert_refused(sizes, mode, act, text)


def test_rows_that_differ_later_are_found_at_run_time():
    # Once a window of some shape has fitted, no batch is looked at before it runs.
    model = compiled_model()
    vb.accumulate(model, microbatch_size=8)
    good = (SHORT[0][:19], SHORT[1])
    model.fit(as_open_dataset(*good), steps_per_epoch=1, shuffle=False, verbose=0)
    before = model.get_weights()
    text = r"All arrays of a batch must have the same number of rows, at least one\. Got rows 20 19"
    with pytest.raises(ValueError, match=text):
        model.fit(as_open_dataset(*SHORT), steps_per_epoch=1, shuffle=False, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
@pytest.mark.parametrize("source", ["arrays", "dataset"])
def test_no_data_is_refused(mode, source):
    model = compiled_model(**mode)
    vb.accumulate(model, microbatch_size=8)
    data = (X[:0], LABELS[:0]) if source == "arrays" else (as_known_dataset(X, LABELS).take(0),)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Got no data\. A generator can be read only once"):
            model.fit(*data, verbose=0, shuffle=False)
        assert int(model.optimizer.iterations) == 0


@pytest.mark.thorough("Keras itself stops there")
def test_data_that_ends_in_a_later_epoch_is_left_to_keras():
    model = compiled_model()
    vb.accumulate(model, microbatch_size=8)
    data = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(50)
    with pytest.warns(UserWarning, match="ran out of data"):
        model.fit(data, steps_per_epoch=2, epochs=2, verbose=0, shuffle=False)
    assert int(model.optimizer.iterations) == 3


def test_sparse_inputs_are_refused():
    inputs = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(50)
    inputs = inputs.map(lambda x, y: (tf.sparse.from_dense(x), y))
    model = keras.Sequential([keras.Input((FEATURES,), sparse=True), layers.Dense(3)])
    model.compile("sgd", crossentropy())
    vb.accumulate(model, microbatch_size=8)
    with pytest.raises(TypeError, match="Got a SparseTensor"):
        model.fit(inputs, verbose=0, shuffle=False)
