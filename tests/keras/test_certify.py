"""Certificates of Keras models: right ones pass, wrong ones are named, and nothing is changed.

They run in float32, as users' models do, unlike the other tests of this folder.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras.certified_models import (
    EXACT,
    LABELS,
    TARGETS,
    WORD_LABELS,
    WORDS,
    Growing,
    X,
    crossentropy,
    dense,
    made,
    sequential,
    two_outputs,
)

import virtualbatch.keras as vb
from virtualbatch import Window
from virtualbatch.keras._certify.certificate import check_numbers_or_strings
from virtualbatch.keras._rows import Rows


@pytest.fixture(autouse=True)
def _float32(_float64):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


class Centred(layers.Layer):
    def call(self, x):
        return x - ops.mean(x, axis=0)


class Counting(layers.Layer):
    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, x):
        self.calls.assign(self.calls + 1.0)
        return x


class Sampling(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(1)

    def call(self, x):
        return x + keras.random.normal(ops.shape(x), seed=self.seeds)


class BatchMean(layers.Layer):
    def call(self, x):
        self.add_loss(ops.square(ops.mean(x)))
        return x


class Log(layers.Layer):
    def call(self, x):
        return ops.log(x)


class Unused(keras.Model):
    def __init__(self):
        super().__init__()
        self.used, self.unused = layers.Dense(2), layers.Dense(3, name="unused")

    def call(self, x):
        self.unused(x)
        return self.used(x)


class Between(keras.Model):
    """Couples rows between its layers, in its own code."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(4), layers.Dense(2, name="last")

    def call(self, x):
        x = self.first(x)
        return self.last(x / (1 + ops.std(x, axis=0)))


class OwnLoss(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.sum(ops.square(ops.cast(y, y_pred.dtype) - y_pred))


def functional():
    inputs = keras.Input((6,))
    x = layers.Dense(4)(inputs)
    return keras.Model(inputs, layers.Dense(2)(x - ops.mean(x, axis=0, keepdims=True)))


def batch_sum(y_true, y_pred):
    return ops.sum(ops.square(y_true - y_pred))


def token_mean(y_true, y_pred):
    known = ops.cast(y_true != 0, y_pred.dtype)
    each = ops.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
    return ops.sum(each * known) / ops.sum(known)


def similarities(y_pred):
    return ops.log_softmax(3 * y_pred @ ops.transpose(y_pred), axis=-1)


def contrastive(y_true, y_pred):
    return -ops.mean(ops.diagonal(similarities(y_pred)))


def contrastive_rows(y_true, y_pred):
    return -ops.diagonal(similarities(y_pred))


def broken():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dense(2)])
    model.layers[0].kernel.assign(np.full((6, 4), np.nan))
    return model


def largest_error(y_true, y_pred):
    return ops.max(ops.abs(y_true - y_pred))


FIRST = dense(4, "tanh")
SPOILT = X.copy()
SPOILT[[3, 17], 2] = np.nan
BAD = [
    ("batchnorm", "batch_normalization", sequential(FIRST, layers.BatchNormalization, dense(2))),
    ("coupled_rows", "centred (Centred)", sequential(FIRST, Centred, dense(2))),
    ("coupled_rows", "the input of between/last (Dense)", Between),
    ("coupled_rows", "subtract (Subtract)", functional),
    ("coupled_rows", "add_loss of sequential/batch_mean", sequential(FIRST, BatchMean, dense(2))),
    ("stateful", "growing (Growing)", sequential(FIRST, Growing, dense(2))),
    ("stateful", "counting/calls", sequential(FIRST, Counting, dense(2))),
    ("sum_loss", "compute_loss of OwnLoss", OwnLoss),
    ("non_finite", "parameter sequential/dense/kernel", broken),
    ("no_gradient", "unused/unused/kernel", Unused),
]
PLAIN = sequential(FIRST, dense(2))
BAD_OPTIONS = [
    ("sum_loss", "the loss batch_sum", {"loss": batch_sum}),
    ("coupled_rows", "the loss contrastive", {"loss": contrastive}),
    ("coupled_rows", "the loss contrastive_rows", {"loss": contrastive_rows}),
    ("stateful", "metric largest_error", {"metrics": [largest_error]}),
]


def with_their_tier(cases, quick, reason):
    """Cases of both tiers and of the thorough one, told by their name, kind or place."""
    found = [any(name in quick for name in case if isinstance(name, str)) for case in cases]
    assert sum(found) >= len(quick)
    thorough = pytest.mark.thorough(reason)
    return [(case, () if both else thorough) for case, both in zip(cases, found, strict=True)]


QUICK_EXACT = {
"two outputs", "masked token weights", "regularisers", "mixed_float16",
}  # fmt: skip
QUICK_BAD = {
    "batch_normalization", "centred (Centred)", "counting/calls", "compute_loss of OwnLoss",
    "parameter sequential/dense/kernel", "unused/unused/kernel",
}  # fmt: skip
QUICK_OPTIONS = {"the loss contrastive_rows", "the loss batch_sum", "metric largest_error"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=marks)
        for case, marks in with_their_tier(EXACT, QUICK_EXACT, "another model that is exact")
    ],
)
def test_exact(case):
    found = vb.certify(made(case.model, **case.options()), case.batch, microbatch_size=8)
    assert found.findings == ()
    assert found.exact
    assert found.parameters
    assert found.max_error < found.tolerance < 1e-4
    found.raise_if_inexact()


def certified_by_microbatches(model, batch):
    """The certificate of a model whose losses do not see all rows, with which they are exact."""
    vb.accumulate(model, microbatch_size=8, gather=False)
    return vb.certify(model, batch, microbatch_size=8)


@pytest.mark.parametrize(
    ("kind", "where", "model"),
    [
        pytest.param(*case, marks=marks)
        for case, marks in with_their_tier(BAD, QUICK_BAD, "another place of a kind that is found")
    ],
)
def test_wrong_models(kind, where, model):
    found = certified_by_microbatches(made(model), (X, TARGETS))
    assert (found.findings[0].kind, found.exact) == (kind, kind == "no_gradient")
    assert where in found.findings[0].where


@pytest.mark.parametrize("case", [BAD[2], BAD[5]], ids=["between layers", "stateful"])
def test_the_cause_is_the_same_from_sketches(case, monkeypatch):
    kind, where, model = case
    monkeypatch.setattr("virtualbatch.certify.activations._KEPT_BYTES", 0)
    found = vb.certify(made(model), (X, TARGETS), microbatch_size=8)
    assert found.findings[0].kind == kind
    assert where in found.findings[0].where


@pytest.mark.parametrize(
    ("kind", "where", "options"),
    [
        pytest.param(*case, marks=marks)
        for case, marks in with_their_tier(BAD_OPTIONS, QUICK_OPTIONS, "another loss of that kind")
    ],
)
def test_wrong_losses_and_metrics(kind, where, options):
    found = certified_by_microbatches(made(PLAIN, **options), (X, TARGETS))
    assert not found.exact
    assert [finding.kind for finding in found.findings] == [kind]
    assert found.findings[0].where == where
    with pytest.raises(ValueError, match=f"{kind} at {where}"):
        found.raise_if_inexact()


def test_the_weight_of_a_mean_over_tokens():
    model = sequential(lambda: layers.Embedding(9, 4), dense(3))
    found = certified_by_microbatches(made(model, loss=token_mean), (WORDS, WORD_LABELS))
    assert not found.exact
    assert found.findings[0].kind == "weight"
    assert "the entries of y that are not 0" in found.findings[0].why
    assert "one value per row or token" in found.findings[0].fix


@pytest.mark.thorough("another place of a kind that is found")
def test_the_one_wrong_output_is_named():
    model = made(two_outputs, loss={"a": batch_sum, "b": crossentropy()})
    found = certified_by_microbatches(model, (X, {"a": TARGETS, "b": LABELS}))
    (finding,) = found.findings
    assert (finding.kind, finding.where) == ("sum_loss", "the loss batch_sum of the output a")


def test_rows_of_data_that_is_not_finite():
    found = vb.certify(made(PLAIN), (SPOILT, TARGETS), microbatch_size=8)
    assert not found.exact
    assert found.findings[0].kind == "non_finite"
    assert found.findings[0].where == "x, rows 3, 17"


@pytest.mark.thorough("another place of a kind that is found")
def test_the_layer_that_is_not_finite():
    model = sequential(FIRST, Log, dense(2))
    found = vb.certify(made(model), (X, TARGETS), microbatch_size=8)
    assert found.findings[0].kind == "non_finite"
    assert "log (Log)" in found.findings[0].where


def test_an_engine_that_is_wrong_is_caught(monkeypatch):
    # Weight regularisers counted once per micro-batch.
    monkeypatch.setattr(Rows, "share", lambda self, dtype: 1.0)
    model = sequential(dense(4, "tanh", kernel_regularizer="l2"), dense(2))
    found = vb.certify(made(model), (X, TARGETS), microbatch_size=8)
    assert not found.exact
    wrong = [name for name, error in found.parameters.items() if error > found.tolerance]
    assert wrong == ["sequential/dense/kernel"]
    assert "bug of virtualbatch: please report it" in found.findings[0].fix


def test_randomness_is_named():
    model = sequential(dense(4), lambda: layers.Dropout(0.5, name="drop"), dense(2))
    notes = vb.certify(made(model), (X, TARGETS), microbatch_size=8).notes
    assert any("turned off for the comparison (drop)" in note for note in notes)
    notes = vb.certify(made(PLAIN), (X, TARGETS), microbatch_size=8).notes
    assert not any("turned off" in note for note in notes)


@pytest.mark.thorough("another place of a kind that is found")
def test_randomness_that_cannot_be_turned_off_is_named():
    found = vb.certify(made(sequential(dense(4), Sampling)), (X, X[:, :4]), microbatch_size=8)
    assert not found.exact
    assert found.findings[0].kind == "stateful"
    assert "sampling" in found.findings[0].where
    assert any("Randomness in sampling could not be turned off" in note for note in found.notes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"accumulation_steps": 3},
        pytest.param({"microbatch_size": 1}, marks=pytest.mark.thorough("another size")),
    ],
)
def test_sizes(sizes):
    assert vb.certify(made(PLAIN), (X, TARGETS), **sizes).exact


@pytest.mark.parametrize(
    ("batch", "sizes", "text"),
    [
        ((X[:1], TARGETS[:1]), {"microbatch_size": 1}, "Got 1 rows in one"),
        ((X, TARGETS), {"microbatch_size": 22}, "Got 22 rows in one"),
        ((X, TARGETS), {}, "microbatch_size"),
        ((X, TARGETS), {"microbatch_size": "auto"}, 'Got microbatch_size="auto"'),
        (Window([(X, TARGETS)]), {"microbatch_size": 8}, "Got a Window"),
        ((X, TARGETS[:4]), {"microbatch_size": 8}, "Got 22 rows in .* and 4 rows"),
    ],
)
def test_refused_batches(batch, sizes, text):
    with pytest.raises(ValueError, match=text):
        vb.certify(made(PLAIN), batch, **sizes)


def test_objects_that_are_no_strings_are_refused():
    with pytest.raises(TypeError, match="Got ndarray with objects of type NoneType"):
        vb.certify(made(PLAIN), (np.array([None] * len(X)), TARGETS), microbatch_size=8)


def test_a_batch_of_bfloat16_is_certified():
    x = keras.ops.cast(keras.ops.convert_to_tensor(X), "bfloat16")
    assert vb.certify(made(PLAIN), (x, TARGETS), microbatch_size=8).exact


def test_strings_are_not_refused():
    check_numbers_or_strings((np.array(["a", b"b"], object), None, X))


def test_refused_models():
    with pytest.raises(TypeError, match="takes a Keras model"):
        vb.certify(object(), (X, TARGETS), microbatch_size=8)
    with pytest.raises(ValueError, match=r"Call model\.compile"):
        vb.certify(PLAIN(), (X, TARGETS), microbatch_size=8)
