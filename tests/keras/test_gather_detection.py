"""Which losses get the predictions of all rows: those that need them, and no other."""

import inspect
import random
import time

import keras
import numpy as np
import pytest
from keras import layers, losses, ops
from tests.keras.backends import BACKEND
from tests.keras.coupled import FEATURES, MASKS, X, clip, mlp

from virtualbatch.keras._current_backend import current_backend
from virtualbatch.keras._gather.detection import found_by_shape, found_on_rows
from virtualbatch.keras._gather.gathering import COMPARES, NO_ROWS, NUMBER, UNCUT

COUPLED = {"Circle": COMPARES, "Dice": NUMBER, "Tversky": NUMBER}
# What cannot run on these targets, or is no loss of its own.
OTHER = {"Loss", "CTC"}
LOSSES = {
    name: found
    for name, found in vars(losses).items()
    if inspect.isclass(found) and name not in OTHER
}
DUE = {name: [COUPLED[name]] if name in COUPLED else [] for name in LOSSES}
INTEGERS = {"Circle", "SparseCategoricalCrossentropy", "CategoricalGeneralizedCrossEntropy"}
Y = np.abs(X[:20, :4])
Y /= Y.sum(1, keepdims=True)
LABELS = np.arange(20) % 4


def looked_at(loss, y, model=None, by_shape=False):
    model = model or mlp(4, "softmax")()
    model.compile("sgd", loss)
    batch = keras.tree.map_structure(
        lambda found: None if found is None else ops.convert_to_tensor(found), (X[:20], y, None)
    )
    if by_shape:
        return found_by_shape(model, batch)
    return found_on_rows(model, batch, 20, current_backend().evaluate)


def targets(name):
    return LABELS if name in INTEGERS else Y


@pytest.mark.parametrize("by_shape", [False, True], ids=["values", "shapes"])
def test_losses_of_keras(by_shape):
    for name, loss in LOSSES.items():
        found = looked_at(loss(), targets(name), by_shape=by_shape)
        assert [why for _, why, _ in found.coupled] == DUE[name], name
        assert (found.gathering is not None) == (name in COUPLED)


def test_the_same_losses_by_their_values():
    """As functions of a user, of which no type tells anything."""
    for name, loss in LOSSES.items():
        own = loss()

        def function(y_true, y_pred, own=own):
            return own.call(y_true, y_pred)

        found = looked_at(function, targets(name))
        assert [why for _, why, _ in found.coupled] == DUE[name], name


def one_number(y_true, y_pred):
    return ops.mean(ops.square(y_pred - y_true))


def of_columns(y_true, y_pred):
    return ops.mean(ops.square(y_pred - y_true), 0)


def whole(y_true, y_pred):
    """Whoever writes the number of rows down."""
    return ops.mean(ops.square(y_pred - y_true), 1) * ops.ones(20)


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (one_number, NUMBER),
        (of_columns, NO_ROWS),
        (whole, UNCUT),
        (losses.CategoricalCrossentropy(axis=0), NO_ROWS),
        (losses.MeanSquaredError(reduction="sum"), None),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_what_a_loss_returns(loss, why):
    found = looked_at(loss, Y)
    assert [found.why for found in found.coupled] == ([why] if why else [])


def test_values_that_are_not_finite():
    """A row that is none of the numbers says whether others read it, and nothing else."""

    def reads_all(y_true, y_pred):
        return ops.sum(ops.matmul(y_pred, ops.transpose(y_true)), 1)

    def of_its_row(y_true, y_pred):
        return ops.sum(y_pred * y_true, 1)

    missing = np.where(np.arange(20)[:, None] == 3, np.nan, Y)
    found = [looked_at(loss, missing).coupled for loss in (reads_all, of_its_row)]
    assert [[why for _, why, _ in coupled] for coupled in found] == [[COMPARES], []]


def test_predictions_of_one_axis_leave_one_number():
    def flat():
        inputs = keras.Input((FEATURES,))
        return keras.Model(inputs, layers.Flatten()(layers.Dense(1)(inputs))[:, 0])

    for by_shape in (False, True):
        (found,) = looked_at("mse", Y[:, 0], flat(), by_shape).coupled
        assert found.why == NUMBER


def test_outputs_that_are_needed():
    inputs = keras.Input((FEATURES,))
    heads = {name: layers.Dense(16, name=name)(inputs) for name in "abc"}
    model = keras.Model(inputs, heads)
    found = looked_at({"b": clip, "c": "mse"}, {"b": Y, "c": X[:20, :1] + np.zeros(16)}, model)
    assert found.gathering.losses == [True, False]
    assert list(found.gathering.outputs) == [False, True, False]


def busy():
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.BatchNormalization(),
            layers.Dense(16, activity_regularizer="l2"),
            layers.Dropout(0.5),
            layers.Dense(4),
        ]
    )


def test_nothing_is_changed():
    model = busy()
    model.compile("adam", lambda y_true, y_pred: ops.sum(ops.square(y_true - y_pred), 1))
    before = [np.array(variable.numpy()) for variable in model.variables]
    drawn = random.getstate(), np.random.get_state()[2]
    batch = ops.convert_to_tensor(X[:20]), ops.convert_to_tensor(Y), None
    assert found_on_rows(model, batch, 20, current_backend().evaluate).gathering is None
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert (random.getstate(), np.random.get_state()[2]) == drawn
    assert not model.optimizer.variables[2:]


if BACKEND != "jax":  # which compiles what it runs

    def test_a_look_takes_no_time():
        model = mlp(6, "sigmoid")()
        model.compile("sgd", lambda y_true, y_pred: ops.mean(ops.square(y_true - y_pred), 1))
        batch = ops.convert_to_tensor(X[:20]), ops.convert_to_tensor(MASKS[:20]), None
        seconds = []
        for _ in range(3):
            start = time.thread_time()
            found_on_rows(model, batch, 20, current_backend().evaluate)
            seconds.append(time.thread_time() - start)
        assert min(seconds) < 0.1
