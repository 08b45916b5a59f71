"""The model is traced once per shape of a micro-batch, and never again in later epochs."""

import keras
import pytest
import tensorflow as tf
from keras import layers
from tests.keras import problems
from tests.keras.problems import FEATURES, X, compiled, crossentropy

import virtualbatch.keras as vb

LABELS = problems.LABELS
# What is looked at eagerly before the first trace, to see whether a loss needs all rows: these
# rows, once by the model, and by the loss together and in halves, with two kinds of targets.
LOOK, LOOKS = 16, 6


class Counting(layers.Layer):
    """Counts how often Python runs its call, which is once per trace."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.calls = []

    def call(self, inputs):
        self.calls.append(tuple(inputs.shape))
        return inputs


class CountingLoss(keras.losses.Loss):
    """The same for a loss."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, y_true, y_pred):
        self.calls += 1
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


def counting(*before, shape=(FEATURES,), sizes=None, **options):
    counter, loss = Counting(), CountingLoss()
    model = keras.Sequential([keras.Input(shape), *before, counter, layers.Dense(3)])
    # Adam, metrics and losses create variables, for which TensorFlow would trace once more.
    model.compile("adam", loss, metrics=["accuracy"], **options)
    vb.accumulate(model, **sizes or {"microbatch_size": 16})
    counter.calls.clear()
    return model, counter.calls, loss


def fit(model, x=X, y=LABELS, **options):
    options = {"batch_size": 50, "epochs": 2, "verbose": 0, "shuffle": False} | options
    model.fit(x, y, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(mode, marks=pytest.mark.thorough("another mode of the same trace"))
            for mode in ({"jit_compile": True}, {"steps_per_execution": 2})
        ),
    ],
    ids=str,
)
def test_one_trace_serves_every_batch(options):
    model, calls, loss = counting(**options)
    fit(model)
    assert calls == [(LOOK, FEATURES), (None, FEATURES)]
    assert loss.calls == LOOKS + 1
    fit(model, batch_size=37)
    fit(model, x=X[:51], y=LABELS[:51])
    assert len(calls) == 2


def test_known_rows_are_traced_per_shape():
    # 65 rows are 16 16 16 16 and 1.
    model, calls, loss = counting()
    rows = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(65, drop_remainder=True)
    model.fit(rows, epochs=3, verbose=0, shuffle=False)
    assert calls == [(LOOK, FEATURES), (16, FEATURES), (1, FEATURES)]
    assert loss.calls == LOOKS + 2


def test_masks_are_traced_once_more_to_be_counted():
    shape = problems.SERIES.shape[1:]
    model, calls, loss = counting(layers.Masking(), shape=shape)
    fit(model, problems.SERIES, problems.TOKEN_LABELS)
    assert calls == [(LOOK, *shape), *[(None, *shape)] * 2]
    assert loss.calls == LOOKS + 2
    fit(model, problems.SERIES, problems.TOKEN_LABELS, batch_size=30)
    assert len(calls) == 3


@pytest.mark.thorough("other ways to the same traces")
def test_train_on_batch_settles_on_one_trace():
    model, calls, _ = counting(sizes={"accumulation_steps": 4})
    for rows in (40, 40, 20, 12, 50, 3):
        model.train_on_batch(X[:rows], LABELS[:rows])
    # Known rows first; from the second size on TensorFlow keeps them open.
    assert calls == [(LOOK, FEATURES), (10, FEATURES), (None, FEATURES)]


@pytest.mark.thorough("other ways to the same traces")
def test_a_lazy_model_is_traced_no_more_often_than_by_keras():
    class Lazy(keras.Model):
        def __init__(self):
            super().__init__()
            self.counter, self.out = Counting(), layers.Dense(3)

        def call(self, inputs):
            return self.out(self.counter(inputs))

    traces = []
    for accumulates in (False, True):
        model = Lazy()
        model.compile(**compiled(loss=crossentropy)())
        if accumulates:
            vb.accumulate(model, microbatch_size=16)
        fit(model)
        traces.append(len(model.counter.calls))
    # And once to look at a few rows.
    assert traces[1] <= traces[0] + 1


def test_a_graph_calls_no_python_per_micro_batch_and_eager_does():
    model, calls, _ = counting(run_eagerly=True)
    fit(model, epochs=1)
    # Eagerly 50 rows are 13 13 12 12, and 30 rows are 15 15.
    assert [rows for rows, _ in calls] == [LOOK] + [13, 13, 12, 12] * 2 + [15, 15]
