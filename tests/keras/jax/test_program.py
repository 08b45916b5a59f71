"""On JAX a batch is one program: what is traced, what memory it plans, what a failed one leaves."""

import jax
import keras
import numpy as np
import pytest
from keras import layers
from tests.keras import problems
from tests.keras.problems import FEATURES, X, classifier, compiled, crossentropy
from tests.keras.training import Case, assert_equals_keras

import virtualbatch.keras as vb

LABELS = problems.LABELS


class Counting(layers.Layer):
    """Notes the shapes with which Python runs its call, once per trace."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.calls = []

    def call(self, inputs):
        self.calls.append(tuple(inputs.shape))
        return inputs


def counting(*before, shape=(FEATURES,)):
    counter = Counting()
    model = keras.Sequential([keras.Input(shape), *before, counter, layers.Dense(3)])
    model.compile("adam", crossentropy(), metrics=["accuracy"])
    vb.accumulate(model, microbatch_size=16)
    return model, counter.calls


def test_each_shape_of_a_micro_batch_is_traced_once():
    model, calls = counting()
    calls.clear()
    model.fit(X[:100], LABELS[:100], batch_size=50, epochs=3, verbose=0)
    # The micro-batches of 50 rows have 16 and 2; Keras itself builds what is not built at 50.
    assert sorted(set(calls)) == [(2, FEATURES), (16, FEATURES), (50, FEATURES)]
    assert calls.count((16, FEATURES)) == calls.count((2, FEATURES)) == 1


def test_masks_cost_one_more_trace_per_shape():
    model, calls = counting(layers.Embedding(5, 4, mask_zero=True), shape=(problems.TOKENS,))
    calls.clear()
    model.fit(problems.WORD_IDS[:48], problems.TOKEN_LABELS[:48], batch_size=48, verbose=0)
    assert calls.count((16, problems.TOKENS, 4)) == 2


def planned_memory(steps):
    """Temporary bytes of the train step's program for so many micro-batches of 16."""
    model = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(64), layers.Dense(3)])
    model.compile("adam", crossentropy(), metrics=["accuracy"])
    vb.accumulate(model, microbatch_size=16)
    x = np.zeros((16 * steps, FEATURES))
    y = np.zeros(16 * steps, "int32")
    model.train_on_batch(x, y)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    program = jax.jit(model.train_step).lower(state, (x, y, None)).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    few, many = planned_memory(4), planned_memory(64)
    assert abs(many - few) <= 0.01 * few


def test_keras_with_nnx_is_refused(monkeypatch):
    model = classifier()
    model.compile("sgd", crossentropy())
    monkeypatch.setattr(keras.config, "is_nnx_enabled", lambda: True)
    with pytest.raises(NotImplementedError, match=r"Got Keras with its NNX mode enabled\. Unset"):
        vb.accumulate(model, microbatch_size=16)
    assert "train_step" not in vars(model)


class Failing(layers.Layer):
    """Raises when it is traced with the rows of the remainder."""

    def call(self, inputs):
        if inputs.shape[0] == 2:
            raise RuntimeError("this layer takes no two rows")
        return inputs


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"run_eagerly": True}, marks=pytest.mark.thorough("the same, run eagerly"))],
    ids=str,
)
def test_a_failed_batch_leaves_the_model_as_it_was(options):
    model = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(3), Failing()])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), crossentropy(), **options)
    vb.accumulate(model, microbatch_size=16)
    model.fit(X[:96], LABELS[:96], batch_size=48, verbose=0)
    before = [np.asarray(v) for v in (*model.variables, *model.optimizer.variables)]
    # 18 rows are cut 16 and 2 by a program, 9 and 9 eagerly; 4 are cut nowhere, and 2 not at all.
    rows = 18 if not options else 2
    with pytest.raises(RuntimeError, match="no two rows"):
        model.fit(X[:rows], LABELS[:rows], batch_size=rows, verbose=0)
    after = [np.asarray(v) for v in (*model.variables, *model.optimizer.variables)]
    for found, due in zip(after, before, strict=True):
        np.testing.assert_array_equal(found, due)
    model.fit(X[:96], LABELS[:96], batch_size=48, verbose=0)
    assert int(model.optimizer.iterations) == 4


@pytest.mark.thorough("test_models.py has other layers in the quick tier")
def test_convolutions():
    def convolutional():
        return keras.Sequential(
            [
                keras.Input(problems.IMAGES.shape[1:]),
                layers.Conv2D(3, 3, activation="tanh", padding="same"),
                layers.DepthwiseConv2D(2),
                layers.Conv2DTranspose(2, 2, strides=2),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )

    assert_equals_keras(Case("", convolutional, compiled(), problems.IMAGES, LABELS))
