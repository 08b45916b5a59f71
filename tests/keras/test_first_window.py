"""The first window of `fit` proves itself, where Keras' own types do not tell how it is cut.

In float32, as users' models are.
"""

import random

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras.backends import BACKEND
from tests.keras.certified_models import EXACT, LABELS, WORD_LABELS, WORDS, dense, made, sequential
from tests.keras.certified_models import TARGETS as WIDE_TARGETS
from tests.keras.certified_models import X as WIDE_X
from tests.keras.packing import IDS, PACKED
from tests.keras.test_certify import (
    BatchMean,
    Centred,
    OwnLoss,
    Sampling,
    batch_sum,
    contrastive_rows,
    functional,
    largest_error,
    token_mean,
)

import virtualbatch.keras as vb
from virtualbatch.certify.first_window import prove
from virtualbatch.keras._certify import first_window
from virtualbatch.keras._certify.first_window import KerasTrial
from virtualbatch.keras._certify.keras_own import is_keras_own
from virtualbatch.keras._checks import unpacked_batch
from virtualbatch.keras._current_backend import backend_for
from virtualbatch.keras._gather.gathering import NOTHING

pytestmark = pytest.mark.proves_itself

X, TARGETS = WIDE_X.astype("float32"), WIDE_TARGETS.astype("float32")
PLAIN = sequential(dense(4, "tanh"), dense(2))


@pytest.fixture(autouse=True)
def _float32(_float64):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def tries(monkeypatch):
    """Rows of the batches of which some are tried, one for each try."""
    found = []

    def noted(trial, why):
        found.append(trial.rows)
        reason = prove(trial, why)
        # Who is right never pays for a certificate.
        assert not trial._certified
        return reason

    monkeypatch.setattr(first_window, "prove", noted)
    return found


def mean_error(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred))


class AddsSum(layers.Layer):
    def call(self, x):
        self.add_loss(ops.sum(ops.square(x)))
        return x


class AddsMean(layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


class OwnMean(keras.Sequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return mean_error(ops.cast(y, y_pred.dtype), y_pred)


# What runs once is not worth a graph.
EAGERLY = {"run_eagerly": BACKEND == "tensorflow"}


def accumulating(model, check=True, size=8, gather=False, **options):
    """By default, losses see micro-batches only: what sees all rows is exact."""
    found = made(model, **EAGERLY | options)
    vb.accumulate(found, microbatch_size=size, check=check, gather=gather)
    return found


QUICK = {"two outputs", "mixture", "masked token weights"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=() if case.name in QUICK else pytest.mark.thorough("another correct model"),
        )
        for case in EXACT
    ],
)
def test_no_false_alarm(case):
    model = made(case.model, **case.options())
    batch = unpacked_batch(model, case.batch)
    trial = KerasTrial(model, batch, 22, [8, 8, 6], backend_for(model), NOTHING)
    assert prove(trial, str) is None


RIGHT = {
    "one number": (PLAIN, {"loss": mean_error}),
    "compute_loss": (lambda: OwnMean([layers.Dense(2)]), {"loss": None}),
    "added": (sequential(dense(4), AddsMean, layers.BatchNormalization, dense(2)), {}),
}
WRONG = {
    "added": (sequential(dense(4), AddsSum, dense(2)), {}, "sum_loss at add_loss of .*AddsSum"),
    "one number": (PLAIN, {"loss": batch_sum}, "sum_loss at the loss batch_sum"),
    "rows": (PLAIN, {"loss": contrastive_rows}, "coupled_rows at the loss contrastive_rows"),
    "compute_loss": (OwnLoss, {"loss": None}, "sum_loss at compute_loss of OwnLoss"),
    "layer": (sequential(dense(4), Centred, dense(2)), {}, r"coupled_rows at .*\(Centred\)"),
    "added mean": (sequential(dense(4), BatchMean, dense(2)), {}, "coupled_rows at add_loss of"),
    "between layers": (functional, {}, r"coupled_rows at .*\(Subtract\)"),
}
FURTHER = pytest.mark.thorough("another place of a kind that is refused")


@pytest.mark.parametrize("name", RIGHT)
def test_what_adds_up_is_tried_and_passes(name, tries, caplog):
    model, options = RIGHT[name]
    accumulating(model, **options).train_on_batch(X, TARGETS)
    assert tries == [22]
    assert not [line for line in caplog.messages if "tried" in line or "returns one" in line]


@pytest.mark.parametrize("name", ["one number", "rows", "compute_loss"])
def test_what_sees_all_rows_is_tried_and_passes(name, tries):
    model, options, _ = WRONG[name]
    accumulating(model, gather=None, **options).train_on_batch(X, TARGETS)
    assert tries == [22]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=FURTHER) if name in {"added mean", "between layers"} else name
        for name in WRONG
    ],
)
def test_what_does_not_add_up_is_refused_and_nothing_is_changed(name):
    model, options, text = WRONG[name]
    model = accumulating(model, **options, metrics=["mae"])
    if name == "added":
        # What an earlier batch counted is kept too.
        vb.restore(model)
        model.train_on_batch(X, TARGETS)
        vb.accumulate(model, microbatch_size=8, gather=False)
    else:
        model(ops.convert_to_tensor(X[:2]))
    before = state(model)
    with pytest.raises(
        ValueError, match=rf"must add up to .* {text}.* See docs/guides/\w+\.md; check=F"
    ):
        model.fit(X, TARGETS, batch_size=22, shuffle=False, verbose=0)
    assert_same(before, state(model))


def state(model):
    """All values that training changes, and where random numbers stand."""
    variables = [*model.variables, *model.optimizer.variables]
    values = [np.array(ops.convert_to_numpy(v.value)) for v in variables]
    return values, random.getstate(), np.random.get_state()[1:3]


def assert_same(before, after):
    # Behind them stand those of an optimizer that was not built.
    for value, same in zip(before[0], after[0], strict=False):
        np.testing.assert_array_equal(value, same)
    assert before[1] == after[1]
    np.testing.assert_array_equal(before[2][0], after[2][0])
    assert before[2][1] == after[2][1]


def test_training_is_the_same_to_the_bit(tries):
    def trained(check):
        model = accumulating(
            sequential(dense(4, "tanh"), layers.BatchNormalization, lambda: layers.Dropout(0.3),
                       AddsMean, dense(2)),
            check, loss=mean_error, metrics=["mae"], run_eagerly=False,
        )  # fmt: skip
        history = model.fit(X, TARGETS, batch_size=20, epochs=2, shuffle=False, verbose=0).history
        return state(model), history, keras.random.uniform((3,))

    proven, plain = trained(True), trained(False)
    # Once, although there are two epochs, and two shapes of batches.
    assert tries == [20]
    assert_same(plain[0], proven[0])
    assert proven[1] == plain[1]
    np.testing.assert_array_equal(*map(ops.convert_to_numpy, (proven[2], plain[2])))


def value_of_sum(y_true, y_pred):
    mean = mean_error(y_true, y_pred)
    return mean + ops.stop_gradient(batch_sum(y_true, y_pred) - mean)


def gradient_of_sum(y_true, y_pred):
    total = batch_sum(y_true, y_pred)
    return total + ops.stop_gradient(mean_error(y_true, y_pred) - total)


@pytest.mark.parametrize("loss", [value_of_sum, gradient_of_sum])
def test_either_a_wrong_value_or_a_wrong_gradient_is_refused(loss):
    with pytest.raises(ValueError, match="must add up to"):
        accumulating(PLAIN, loss=loss).train_on_batch(X, TARGETS)


def test_a_mean_over_tokens_is_refused():
    model = sequential(lambda: layers.Embedding(9, 4), dense(3))
    model = accumulating(model, loss=token_mean)
    with pytest.raises(ValueError, match="weight at the loss token_mean"):
        model.train_on_batch(WORDS, WORD_LABELS)


def test_the_check_can_be_turned_off():
    accumulating(PLAIN, check=False, loss=batch_sum).train_on_batch(X, TARGETS)


def test_what_is_not_cut_is_not_tried(tries):
    model = accumulating(PLAIN, loss=batch_sum)
    model.train_on_batch(X[:8], TARGETS[:8])
    assert tries == []
    with pytest.raises(ValueError, match="sum_loss"):
        model.train_on_batch(X[:9], TARGETS[:9])
    # Nothing is remembered of what was refused.
    with pytest.raises(ValueError, match="sum_loss"):
        model.train_on_batch(X[:9], TARGETS[:9])
    assert tries == [9, 9]


def test_another_loss_is_tried_anew(tries):
    model = accumulating(PLAIN, loss=mean_error)
    model.train_on_batch(X, TARGETS)
    model.compile("sgd", batch_sum)
    with pytest.raises(ValueError, match="sum_loss"):
        model.train_on_batch(X, TARGETS)
    assert tries == [22, 22]


def test_rows_take_their_sample_weights_along(tries):
    weights = np.arange(22.0)
    model = accumulating(sequential(dense(4), AddsMean, dense(2)))
    model.train_on_batch(X, TARGETS, sample_weight=weights)
    assert tries == [22]


def test_a_packed_batch_is_tried_by_its_rows(tries):
    def tokens(y_true, y_pred):
        return ops.sum(ops.square(y_pred[..., 0] - ops.cast(y_true, y_pred.dtype)))

    inputs = keras.Input((None,), dtype="int32")
    model = keras.Sequential([inputs, layers.Embedding(50, 4), layers.Dense(2)])
    model.compile("sgd", tokens, **EAGERLY)
    targets = np.ones(IDS.shape, "int32")
    vb.accumulate(model, **PACKED, gather=False)
    with pytest.raises(ValueError, match="sum_loss at the loss tokens"):
        model.train_on_batch(IDS[:20], targets[:20])
    vb.accumulate(model, gather=False, **PACKED | {"microbatch_tokens": 2 * IDS.shape[1]})
    model.train_on_batch(IDS[:2], targets[:2])
    assert tries == [20]


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (
            sequential(dense(4), Sampling, dense(2)),
            {},
            "randomness in sampling cannot be turned off",
        ),
        (
            sequential(dense(4), AddsMean, dense(2)),
            {"loss": "circle"},
            "the loss circle sees many rows at once",
        ),
    ],
)
def test_what_cannot_be_tried_is_said_once_and_trained(model, options, reason, caplog):
    model = accumulating(model, **options)
    for _ in range(2):
        model.train_on_batch(X, TARGETS if model.loss == "mse" else LABELS)
    (line,) = [line for line in caplog.messages if "tried" in line]
    assert f"could not be tried ({reason}" in line


def test_an_error_on_few_rows_is_said_and_trained(caplog):
    def pairs(y_true, y_pred):
        return ops.mean(ops.reshape(ops.square(y_true - y_pred), (-1, 2, 2)))

    accumulating(PLAIN, loss=pairs).train_on_batch(X[:16], TARGETS[:16])
    (line,) = [line for line in caplog.messages if "tried" in line]
    assert "Error: " in line


def test_numbers_of_the_host_cannot_be_tried(caplog):
    def noisy(y_true, y_pred):
        return mean_error(y_true, y_pred) * np.random.random()

    model = accumulating(PLAIN, loss=noisy, run_eagerly=True)
    model.train_on_batch(X, TARGETS)
    (line,) = [line for line in caplog.messages if "tried" in line]
    assert "draws random numbers by Python or NumPy" in line


def shifted(x):
    return x


class OwnRegulariser(keras.regularizers.Regularizer):
    def __call__(self, x):
        return ops.mean(x)


@pytest.mark.parametrize(
    ("model", "options", "own"),
    [
        (sequential(dense(4, "gelu"), lambda: layers.LSTM(2)), {}, True),
        (PLAIN, {"loss": keras.losses.mean_squared_error}, True),
        (PLAIN, {"loss": [keras.losses.Huber()]}, True),
        (PLAIN, {"loss": mean_error}, False),
        (sequential(dense(4, shifted)), {}, False),
        (sequential(dense(4, activity_regularizer=OwnRegulariser())), {}, False),
        (sequential(lambda: layers.Lambda(shifted)), {}, False),
        (sequential(lambda: layers.Bidirectional(layers.RNN(layers.LSTMCell(2)))), {}, True),
        (lambda: OwnMean([layers.Dense(2)]), {"loss": None}, False),
        (functional, {}, False),
    ],
)
def test_what_is_keras_own(model, options, own):
    assert is_keras_own(made(model, **options)) is own


def test_what_is_keras_own_is_not_tried(tries):
    model = accumulating(PLAIN, metrics=[largest_error])
    model.train_on_batch(X, TARGETS)
    assert tries == []
