"""Every kind of model, layer and added loss equals plain Keras on the whole batch."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras import problems
from tests.keras.backends import supported
from tests.keras.problems import FEATURES, TOKENS, WORDS, X, compiled
from tests.keras.training import (
    BATCH,
    MICRO,
    ROWS,
    Batches,
    Case,
    assert_equals_keras,
    in_tiers,
    train,
)

import virtualbatch.keras as vb

LABELS, TOKEN_LABELS, SERIES = problems.LABELS, problems.TOKEN_LABELS, problems.SERIES


class Penalised(layers.Layer):
    """Adds a loss on data, one on data and weights, and one on weights alone."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, inputs):
        self.add_loss(ops.mean(ops.square(inputs)))
        self.add_loss(ops.mean(ops.square(inputs * self.scale - 1)))
        self.add_loss(0.1 * ops.sum(self.scale**2))
        return inputs * self.scale


class AddsArrays(layers.Layer):
    """Adds losses that Keras adds up: of rows, of tokens, of weights, of features and of a number.

    There are as many weights as a micro-batch has rows, so their array could be taken for rows.
    """

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.others = self.add_weight(shape=(MICRO,), initializer="ones")

    def call(self, inputs):
        scaled = inputs * self.scale
        self.add_loss(ops.mean(ops.square(scaled), (1, 2)))
        self.add_loss(0.1 * ops.square(scaled))
        self.add_loss(ops.reshape(ops.mean(scaled, (1, 2)), (1, -1)))
        self.add_loss(0.1 * ops.square(self.others))
        self.add_loss(ops.mean(ops.square(scaled - 1), 0))
        self.add_loss(ops.mean(ops.square(scaled), keepdims=True))
        return scaled


def adds_arrays():
    """The regularisers, too, return arrays; Keras divides that of activities by the rows."""
    return keras.Sequential(
        [
            keras.Input(SERIES.shape[1:]),
            AddsArrays(activity_regularizer=lambda x: 0.1 * ops.square(x)),
            layers.Dense(3, kernel_regularizer=lambda x: 0.1 * ops.square(x)),
        ]
    )


class AddsByRows(layers.Layer):
    """Adds one loss more where there are few rows."""

    def call(self, inputs):
        for _ in range(2 if inputs.shape[0] == 3 else 1):
            self.add_loss(ops.square(inputs))
        return inputs


def rematerialised():
    """Its hidden layer runs again in the backward pass."""
    with keras.RematScope(mode="full"):
        hidden = layers.Dense(4, activation="tanh", kernel_regularizer="l2")
    return keras.Sequential([keras.Input((FEATURES,)), hidden, layers.Dense(3)])


class Lazy(keras.Model):
    """A subclassed model that is built by its first batch."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(4, activation="tanh", kernel_regularizer="l2")
        self.out = layers.Dense(3)

    def call(self, inputs, training=False):
        hidden = self.hidden(inputs["a"]) + self.hidden(inputs["b"])
        if training:
            self.add_loss(ops.mean(hidden**2))
        return self.out(hidden)


class FromLists(keras.Model):
    """Takes a tuple with a tuple in it."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3)

    def call(self, inputs):
        first, (second,) = inputs
        return self.out(first) + self.out(second)


class OwnLoss(keras.Model):
    """Computes its loss itself: one mean over rows, and a term of weights alone."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3)

    def call(self, inputs):
        return self.out(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        y = ops.cast(y, y_pred.dtype)[:, None]
        return ops.mean(ops.square(y_pred - y)) + 0.1 * ops.sum(self.out.kernel**2)


class NeedsValues(keras.Model):
    """Works eagerly only."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3)

    def call(self, inputs):
        logits = self.out(inputs)
        return logits * (2.0 if np.isfinite(ops.convert_to_numpy(logits)).all() else 1.0)


def stacked(*hidden, inputs=FEATURES, **options):
    shape = (inputs,) if isinstance(inputs, int) else inputs
    return lambda: keras.Sequential(
        [keras.Input(shape, **options), *(make() for make in hidden), layers.Dense(3)]
    )


def recurrent():
    return layers.GRU(2, return_sequences=True)


def nested():
    """A model in a model, called twice, with regularised weights and activities."""
    block = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(4, "tanh", kernel_regularizer="l2", activity_regularizer="l1"),
        ]
    )
    inputs = keras.Input((FEATURES,))
    outer = keras.Model(inputs, 2 * block(inputs))
    inputs = keras.Input((FEATURES,))
    return keras.Model(inputs, layers.Dense(3)(outer(inputs) + outer(2 * inputs)))


def attention():
    inputs = keras.Input(SERIES.shape[1:])
    masked = layers.Masking()(inputs)
    # Asked for its scores, it computes them itself: JAX' own attention does so in float32.
    attended, _ = layers.MultiHeadAttention(2, 3, use_bias=False)(
        masked, masked, return_attention_scores=True
    )
    return keras.Model(inputs, layers.Dense(3)(layers.LayerNormalization()(attended + masked)))


class Tied(layers.Layer):
    """Scores words by the embedding that read them: a sparse and a dense gradient of one."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def call(self, inputs):
        return ops.matmul(inputs, ops.transpose(self.embedding.embeddings))


def tied():
    words = layers.Embedding(WORDS, 4)
    inputs = keras.Input((TOKENS,), dtype="int32")
    return keras.Model(inputs, Tied(words)(layers.Dense(4)(words(inputs))))


def only_added_loss():
    inputs = keras.Input((FEATURES,))
    return keras.Model(inputs, Penalised()(layers.Dense(4)(inputs)))


DICT = {"a": X, "b": X[::-1].copy()}

REASON = "other layers and modes with the terms of the quick cases"

CASES = supported([
    Case("regularisers", lambda: problems.classifier(
        kernel_regularizer="l1", bias_regularizer="l2", activity_regularizer="l2"),
        compiled(), X, LABELS),
    Case("add_loss and masks", stacked(layers.Masking, Penalised, inputs=SERIES.shape[1:]),
         compiled(), SERIES, TOKEN_LABELS),
    Case("add_loss only, no y", only_added_loss, lambda: {"optimizer": "sgd"}, X, None,
         {"batch_size": BATCH}),
    Case("add_loss of arrays", adds_arrays, compiled(), SERIES, TOKEN_LABELS, rows=ROWS),
    Case("subclassed, dict", Lazy, compiled(), DICT, LABELS),
    Case("needs values", NeedsValues, compiled(run_eagerly=True), X, LABELS,
         needs=("values in call",)),
    Case("own compute_loss", OwnLoss, compiled(loss=None), X, LABELS),
    Case("nested and shared", nested, compiled(), X, LABELS),
    Case("tied embedding", tied, compiled(), problems.WORD_IDS,
         problems.WORD_IDS[:, ::-1].copy()),
    Case("embedding, clipped Adam", stacked(lambda: layers.Embedding(WORDS, 4), layers.Flatten,
                                            inputs=TOKENS, dtype="int32"),
         compiled(optimizer=lambda: keras.optimizers.Adam(clipnorm=0.01)),
         problems.WORD_IDS, LABELS),
])  # fmt: skip

FURTHER = supported([
    Case("add_loss", stacked(lambda: layers.Dense(4), Penalised), compiled(), X, LABELS),
    Case("add_loss and masks, eager", stacked(layers.Masking, Penalised, inputs=SERIES.shape[1:]),
         compiled(run_eagerly=True), SERIES, TOKEN_LABELS),
    Case("add_loss of arrays, eager", adds_arrays, compiled(run_eagerly=True),
         SERIES, TOKEN_LABELS),
    Case("RematScope", rematerialised, compiled(), X, LABELS, needs=("layers that run again",)),
    Case("subclassed, dict, eager", Lazy, compiled(run_eagerly=True), DICT, LABELS),
    Case("subclassed, tuples", FromLists, compiled(),
         lambda: Batches((X, (3 * X,)), LABELS)),
    Case("own compute_loss, eager", OwnLoss, compiled(loss=None, run_eagerly=True), X, LABELS),
    Case("convolution", stacked(lambda: layers.Conv2D(3, 3, activation="relu"), layers.MaxPool2D,
                                layers.Flatten, inputs=problems.IMAGES.shape[1:]),
         compiled(), problems.IMAGES, LABELS),
    Case("recurrent, masked", stacked(layers.Masking, recurrent, inputs=SERIES.shape[1:]),
         compiled(), SERIES, TOKEN_LABELS),
    Case("attention, masked", attention, compiled(), SERIES, TOKEN_LABELS),
    Case("frozen layer", stacked(lambda: layers.Dense(4, trainable=False)), compiled(), X, LABELS),
])  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case)


@pytest.mark.thorough("nothing is trained")
@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_a_model_without_trainable_weights_equals_keras():
    def frozen():
        return keras.Sequential([keras.Input((FEATURES,)), layers.Dense(3, trainable=False)])

    assert_equals_keras(Case("", frozen, compiled(), X, LABELS))


def test_added_losses_that_depend_on_the_number_of_rows_are_refused():
    model = stacked(AddsByRows)()
    model.compile("sgd", "mse")
    vb.accumulate(model, microbatch_size=4)
    with pytest.raises(
        ValueError, match=r"losses for any number of rows\. Got 1 for a micro-batch"
    ):
        model.train_on_batch(X[:8], np.zeros((8, 3)))


def test_own_compute_loss_is_named_once(caplog):
    sizes = {"microbatch_size": MICRO, "gather": False}
    train(Case("", OwnLoss, compiled(loss=None), X, LABELS, sizes=sizes), accumulated=True)
    said = [record.getMessage() for record in caplog.records if record.name == "virtualbatch"]
    assert said == ["OwnLoss overrides compute_loss: its result is treated as one mean over rows."]


def test_spectral_normalisation_is_named(caplog):
    model = stacked(lambda: layers.SpectralNormalization(layers.Dense(4), name="spectral"))
    train(Case("", model, compiled(), X, LABELS), accumulated=True)
    said = [record.getMessage() for record in caplog.records if record.name == "virtualbatch"]
    assert len(said) == 1
    assert "(spectral) change with each forward" in said[0]
