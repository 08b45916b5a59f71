"""The log names the micro-batch of a `fit` whose loss is not finite, once its device is done."""

import keras
import numpy as np
import pytest
from tests.keras.backends import BACKEND

import virtualbatch.keras as vb

ROWS, BATCH, MICRO = 30, 10, 4
X = np.random.default_rng(0).normal(size=(ROWS, 3))
# Of row 5 of a batch: an even cut has 4, 3 and 3 rows.
SECOND = "rows 4 to 6" if BACKEND == "torch" else "rows 4 to 7"


def fit(bad=(), targets=False, options=None, fit=None, **compile_options):
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **compile_options)
    vb.accumulate(model, **({"microbatch_size": MICRO} | (options or {})))
    x, y = X.copy(), X[:, :1].copy()
    (y if targets else x)[list(bad)] = np.nan
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, **(fit or {}))
    return model


def said(caplog):
    return [x for x in caplog.messages if "not_finite.md" in x]


def test_the_first_micro_batch_is_named_once(caplog):
    fit([15], fit={"epochs": 2})
    (message,) = said(caplog)
    assert message.startswith(f"The loss is nan in micro-batch 2 of 3 of window 2 ({SECOND} of")


def test_the_last_window_of_a_fit_is_heard_of(caplog):
    fit([29])
    (message,) = said(caplog)
    assert "in micro-batch 3 of 3 of window 3 (" in message


def test_nothing_is_said_of_finite_losses(caplog):
    model = fit(fit={"epochs": 2})
    assert said(caplog) == []
    # Nothing that was told is left in what users see.
    logs = model.train_on_batch(X[:BATCH], X[:BATCH, :1], return_dict=True)
    assert set(logs) == {"loss"}


def test_train_on_batch_names_it(caplog):
    model = fit()
    x = X[:BATCH].copy()
    x[5] = np.inf
    model.train_on_batch(x, X[:BATCH, :1])
    (message,) = said(caplog)
    assert f"is inf in micro-batch 2 of 3 of window 4 ({SECOND}" in message.replace("nan", "inf")


def test_a_window_of_one_micro_batch_is_named(caplog):
    fit([15], options={"microbatch_size": BATCH})
    (message,) = said(caplog)
    assert message.startswith("The loss is nan in window 2 (rows 0 to 9 of its batch), so")


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (
            False,
            "The prediction of the model is not finite in micro-batch 2 of 3 of window 2 "
            f"({SECOND}",
        ),
        (True, "The loss is nan in window 2, so"),
    ],
)
def test_of_a_loss_of_all_rows_the_predictions_are_told_of(caplog, targets, text):
    fit([15], targets, {"gather": True})
    (message,) = said(caplog)
    assert message.startswith(text)


def test_an_eager_fit_names_it(caplog):
    fit([15], run_eagerly=True)
    (message,) = said(caplog)
    assert "in micro-batch 2 of 3 of window 2 (rows 4 to 6 of its batch)" in message


def test_what_is_certified_is_no_update(caplog):
    """Its micro-batch may have a loss that is not finite where that of the batch is."""

    def weighted(y, y_pred):
        return keras.ops.sum(y[:, 1:] * (y[:, :1] - y_pred) ** 2) / keras.ops.sum(y[:, 1:])

    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", weighted)
    vb.accumulate(model, microbatch_size=MICRO, gather=False)
    y = np.ones((BATCH, 2))
    y[MICRO : 2 * MICRO, 1] = 0
    assert not vb.certify(model, (X[:BATCH], y), microbatch_size=MICRO).exact
    assert said(caplog) == []


@pytest.mark.thorough("what a plan needs is tried by its own tests")
def test_a_planned_size_names_it_too(caplog):
    fit([15], options={"microbatch_size": "auto"})
    (message,) = said(caplog)
    assert "window 2" in message
