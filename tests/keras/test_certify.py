"""certify for Keras: no false alarm, the layer is named, and nothing is touched."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras.backends import BACKEND

import virtualbatch.keras as vb

ROWS, CLASSES = 22, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 8))
IMAGES = RNG.normal(size=(ROWS, 6, 6, 2))
LABELS = RNG.integers(0, CLASSES, ROWS)
WEIGHTS = RNG.random(ROWS)
# Ragged rows of 2 to 6 tokens, padded with 0.
TOKENS = RNG.integers(1, 12, (ROWS, 6)) * (np.arange(6) < 2 + np.arange(ROWS)[:, None] % 5)


def compiled(shape, *stack, loss="sparse_categorical_crossentropy", **options):
    model = keras.Sequential([layers.Input(shape), *stack])
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"], **options)
    return model


def head():
    return layers.Dense(CLASSES, activation="softmax")


def two_outputs():
    inputs = layers.Input((8,))
    h = layers.Dense(6, activation="relu")(inputs)
    outputs = {
        "a": layers.Dense(CLASSES, activation="softmax", name="a")(h),
        "b": layers.Dense(1, name="b")(h),
    }
    model = keras.Model(inputs, outputs)
    losses = {"a": "sparse_categorical_crossentropy", "b": "mse"}
    model.compile("sgd", losses, loss_weights={"a": 0.5, "b": 2.0})
    return model, (X, {"a": LABELS, "b": X[:, :1]})


def attention():
    inputs = layers.Input((5, 8))
    h = layers.LayerNormalization()(inputs)
    h = inputs + layers.MultiHeadAttention(2, 4, dropout=0.1)(h, h)
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(h)))
    model.compile("adam", "mse")
    return model, (RNG.normal(size=(ROWS, 5, 8)), X[:, :1])


def shared():
    layer = layers.Dense(8, activation="tanh")
    inputs = layers.Input((8,))
    model = keras.Model(inputs, layers.Dense(1)(layer(layer(inputs))))
    model.compile("sgd", "mse")
    return model, (X, X[:, :1])


def frozen():
    model = compiled((8,), layers.Dense(16), layers.BatchNormalization(trainable=False), head())
    return model, (X, LABELS)


def mixed():
    model = compiled(
        (8,),
        layers.Dense(16, activation="relu", dtype="mixed_bfloat16"),
        layers.Dense(CLASSES, activation="softmax", dtype="float32"),
    )
    return model, (X, LABELS)


CORRECT = {
    "MLP": lambda: (compiled((8,), layers.Dense(16, activation="relu"), head()), (X, LABELS)),
    "dropout and noise": lambda: (
        compiled((8,), layers.Dropout(0.5), layers.GaussianNoise(0.3), head()),
        (X, LABELS),
    ),
    "sample weights": lambda: (compiled((8,), head()), (X, LABELS, WEIGHTS)),
    "CNN": lambda: (
        compiled((6, 6, 2), layers.Conv2D(3, 3), layers.ReLU(), layers.Flatten(), head()),
        (IMAGES, LABELS),
    ),
    "masked LSTM": lambda: (
        compiled(
            (6,), layers.Embedding(12, 6, mask_zero=True), layers.LSTM(5, dropout=0.2), head()
        ),
        (TOKENS, LABELS),
    ),
    "masked tokens": lambda: (
        compiled(
            (6,),
            layers.Embedding(12, 6, mask_zero=True),
            layers.GRU(5, return_sequences=True),
            layers.Dense(12, activation="softmax"),
        ),
        (TOKENS, TOKENS),
    ),
    "regularisers": lambda: (
        compiled(
            (8,), layers.Dense(16, kernel_regularizer="l2", activity_regularizer="l1"), head()
        ),
        (X, LABELS),
    ),
    "two outputs": two_outputs,
    "attention": attention,
    "shared layer": shared,
    "frozen batch norm": frozen,
    "mixed precision": mixed,
}


@pytest.mark.parametrize("name", CORRECT)
def test_no_false_alarm(name):
    model, batch = CORRECT[name]()
    found = vb.certify(model, batch, microbatch_size=7)
    assert found.findings == (), found
    assert found.exact
    assert set(found.parameters) == {v.path for v in model.trainable_variables}


class Centred(layers.Layer):
    def call(self, x):
        return x - ops.mean(x, 0)


class Doubling(layers.Layer):
    def build(self, shape):
        self.factor = self.add_weight(shape=(), initializer="ones", trainable=False)

    def call(self, x):
        self.factor.assign(self.factor * 2)
        return x * self.factor


class Logarithm(layers.Layer):
    def call(self, x):
        return ops.log(x)


def summed(y, found):
    return ops.sum(keras.losses.sparse_categorical_crossentropy(y, found))


def contrastive(y, found):
    return ops.mean(ops.logsumexp(ops.matmul(found, ops.transpose(found)), 1))


def stacked(*stack, **options):
    return lambda: (compiled((8,), layers.Dense(16), *[make() for make in stack], **options), X)


# name -> (model and inputs, kind, text of where)
WRONG = {
    "batch norm": (
        stacked(layers.BatchNormalization, head),
        "batchnorm",
        "batch_normalization (BatchNormalization)",
    ),
    "centred": (stacked(Centred, head), "coupled_rows", "centred (Centred)"),
    "doubling": (stacked(Doubling, head), "stateful", "doubling (Doubling)"),
    "a sum": (stacked(head, loss=summed), "sum_loss", "the loss"),
    "contrastive": (stacked(head, loss=contrastive), "coupled_rows", "the loss"),
    "logarithm": (stacked(Logarithm, head), "non_finite", "logarithm (Logarithm)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_layer_is_named(name):
    make, kind, where = WRONG[name]
    model, x = make()
    found = vb.certify(model, (x, LABELS), microbatch_size=8)
    assert not found.exact
    assert [finding.kind for finding in found.findings] == [kind], found
    assert where in found.findings[0].where


def test_data_and_weights_that_are_not_finite_are_named():
    model = compiled((8,), head())
    x = X.copy()
    x[3, 1] = np.nan
    (finding,) = vb.certify(model, (x, LABELS), microbatch_size=7).findings
    assert (finding.kind, finding.where) == ("non_finite", "batch[0], row 3")
    kernel = model.trainable_variables[0]
    kernel.assign(ops.full(kernel.shape, np.inf))
    (finding,) = vb.certify(model, (X, LABELS), microbatch_size=7).findings
    assert finding.kind == "non_finite"
    assert finding.where.startswith("parameter ")


def test_a_layer_that_is_not_used_is_named_and_nothing_is_wrong():
    class Unused(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = head(), layers.Dense(2)

        def build(self, shape):
            self.used.build(shape)
            self.unused.build(shape)

        def call(self, x):
            return self.used(x)

    model = Unused()
    model.compile("sgd", "sparse_categorical_crossentropy")
    found = vb.certify(model, (X, LABELS), microbatch_size=7)
    assert found.exact
    # JAX gives zeros where others give nothing.
    due = [] if BACKEND == "jax" else ["no_gradient", "no_gradient"]
    assert [finding.kind for finding in found.findings] == due


def everything(model):
    found = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return [np.array(ops.convert_to_numpy(ops.convert_to_tensor(v))) for v in found]


@pytest.mark.parametrize("accumulated", [False, True])
def test_nothing_is_touched(accumulated):
    def trained(certified):
        keras.utils.set_random_seed(0)
        model = compiled(
            (8,), layers.Dense(6), layers.Dropout(0.5), layers.BatchNormalization(), head()
        )
        if accumulated:
            vb.accumulate(model, microbatch_size=6)
        model.fit(X, LABELS, batch_size=11, verbose=0)
        if certified:
            before = everything(model)
            attributes = set(vars(model)), [set(vars(x)) for x in model._flatten_layers()]
            assert not vb.certify(model, (X, LABELS), microbatch_size=7).exact
            assert all(map(np.array_equal, before, everything(model)))
            assert attributes == (set(vars(model)), [set(vars(x)) for x in model._flatten_layers()])
        history = model.fit(X, LABELS, batch_size=11, epochs=2, verbose=0, shuffle=False)
        return history.history, everything(model)

    with_it, without_it = trained(True), trained(False)
    assert with_it[0] == without_it[0]
    assert all(map(np.array_equal, with_it[1], without_it[1]))


def test_a_model_that_is_not_built_is_built():
    model = keras.Sequential([head()])
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert vb.certify(model, (X, LABELS), microbatch_size=7).exact


def test_a_certificate_says_how_it_compared():
    found = vb.certify(*CORRECT["dropout and noise"](), microbatch_size=7)
    assert found.notes == ("Compared in float64.", "Compared without dropout and noise.")
    assert json.loads(found.to_json())["exact"] is True


@pytest.mark.parametrize(
    ("rows", "size", "text"),
    [(1, 1, "Got 1 rows in one"), (6, 6, "Got 6 rows in one"), (6, 0, "microbatch_size=0")],
)
def test_refusals(rows, size, text):
    model = compiled((8,), head())
    with pytest.raises(ValueError, match=text):
        vb.certify(model, (X[:rows], LABELS[:rows]), microbatch_size=size)
    with pytest.raises(ValueError, match="must be compiled"):
        vb.certify(keras.Sequential([head()]), (X, LABELS), microbatch_size=2)
