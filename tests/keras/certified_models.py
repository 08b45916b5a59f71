"""Models for `certify`: those whose accumulation is exact, their data, and one with state."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops
from tests.keras.backends import available

ROWS = 22
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 6))
TARGETS = RNG.normal(size=(ROWS, 2))
LABELS = RNG.integers(0, 3, ROWS)
WEIGHTS = RNG.random(ROWS)
IMAGES = RNG.normal(size=(ROWS, 8, 8, 2))
LENGTHS = RNG.integers(1, 8, ROWS)
WORDS = RNG.integers(1, 9, (ROWS, 7)) * (np.arange(7) < LENGTHS[:, None])
WORD_LABELS = RNG.integers(0, 3, (ROWS, 7))
SERIES = RNG.normal(size=(ROWS, 7, 4))


def crossentropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


class Case(NamedTuple):
    """A model and how it is compiled, each made anew, and a batch."""

    name: str
    model: Any
    batch: Any
    options: Any = dict


def sequential(*made):
    return lambda: keras.Sequential([make() for make in made])


def dense(*args, **options):
    return lambda: layers.Dense(*args, **options)


def classes():
    return {"loss": crossentropy(), "metrics": ["accuracy"]}


def two_outputs():
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="tanh")(inputs)
    outputs = {"a": layers.Dense(2, name="a")(hidden), "b": layers.Dense(3, name="b")(hidden)}
    return keras.Model(inputs, outputs)


def shared():
    inputs = keras.Input((6,))
    layer = layers.Dense(6, activation="tanh")
    return keras.Model(inputs, layers.Dense(2)(layer(layer(inputs))))


class Tied(keras.Model):
    """A language model whose output is its embedding."""

    def __init__(self):
        super().__init__()
        self.words = layers.ReversibleEmbedding(9, 4)
        self.hidden = layers.Dense(4, activation="tanh")

    def call(self, x):
        return self.words(self.hidden(self.words(x)), reverse=True)


def transformer():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    x = x + layers.MultiHeadAttention(2, 4, dropout=0.2)(x, x)
    x = layers.LayerNormalization()(x)
    x = layers.LayerNormalization()(x + layers.Dense(8)(layers.Dense(16, "gelu")(x)))
    return keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.3)(x)))


def frozen():
    model = keras.Sequential(
        [layers.Dense(5, "tanh"), layers.BatchNormalization(), layers.Dense(2)]
    )
    model.layers[0].trainable = False
    model.layers[1].trainable = False
    return model


def autoencoder():
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(inputs)
    return keras.Model(inputs, layers.Conv2DTranspose(2, 3, strides=2, padding="same")(x))


def in_policy(policy):
    return lambda: keras.Sequential(
        [
            layers.Dense(8, "relu", dtype=policy),
            layers.LayerNormalization(dtype=policy),
            layers.Dense(2, dtype=policy),
        ]
    )


def convolutional():
    return keras.Sequential(
        [
            layers.RandomFlip(),
            layers.Conv2D(4, 3, activation="relu"),
            layers.GroupNormalization(2),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


class Mixture(layers.Layer):
    """Rows choose between two functions of themselves, and each adds a loss."""

    def build(self, shape):
        self.one = self.add_weight(shape=(shape[-1], 4), name="one")
        self.two = self.add_weight(shape=(shape[-1], 4), name="two")

    def call(self, x):
        chosen = ops.where(x[:, :1] > 0, x @ self.one, x @ self.two)
        self.add_loss(ops.mean(ops.square(chosen), -1))
        return chosen


class NeedsValues(keras.Model):
    """Looks at numbers in Python, so that it only runs eagerly."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(4), layers.Dense(2)

    def call(self, x):
        x = self.first(x)
        return self.last(x if ops.convert_to_numpy(x).max() < 1e6 else x * 0.0)


class Growing(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", trainable=False, name="scale")

    def call(self, x):
        self.scale.assign(self.scale * 1.5)
        return x * self.scale


EXACT = [
    Case("mlp", sequential(dense(5, "relu"), dense(2)), (X, TARGETS), lambda: {"metrics": ["mae"]}),
    Case("convolutions", convolutional, (IMAGES, LABELS), classes),
    Case("autoencoder", autoencoder, (IMAGES, IMAGES)),
    Case(
        "masked lstm",
        sequential(
            lambda: layers.Embedding(9, 4, mask_zero=True),
            lambda: layers.LSTM(5, return_sequences=True, dropout=0.2, recurrent_dropout=0.2),
            dense(3),
        ),
        (WORDS, WORD_LABELS),
        classes,
    ),
    Case(
        "bidirectional gru",
        sequential(lambda: layers.Bidirectional(layers.GRU(3)), dense(2)),
        (SERIES, TARGETS),
    ),
    Case("transformer", transformer, (WORDS, WORD_LABELS), classes),
    Case(
        "two outputs",
        two_outputs,
        (X, {"a": TARGETS, "b": LABELS}),
        lambda: {
            "loss": {"a": "mse", "b": crossentropy()},
            "loss_weights": {"a": 0.3, "b": 2.0},
            "metrics": {"a": ["mae"], "b": ["accuracy"]},
        },
    ),
    Case(
        "sample weights",
        sequential(dense(5, "tanh"), dense(3)),
        (X, LABELS, WEIGHTS),
        lambda: {
            "loss": crossentropy(reduction="mean_with_sample_weight"),
            "weighted_metrics": ["accuracy"],
        },
    ),
    # Keras on PyTorch multiplies these weights by the mask in place.
    Case(
        "masked token weights",
        sequential(lambda: layers.Embedding(9, 4, mask_zero=True), dense(3)),
        (WORDS, WORD_LABELS, RNG.random((ROWS, 7))),
        lambda: {"loss": crossentropy()},
    ),
    Case(
        "sum",
        sequential(dense(5, "tanh"), dense(3)),
        (X, LABELS),
        lambda: {"loss": crossentropy(reduction="sum")},
    ),
    Case(
        "ignored class",
        sequential(dense(5, "tanh"), dense(3)),
        (X, np.where(np.arange(ROWS) < 6, -1, LABELS)),
        lambda: {"loss": crossentropy(ignore_class=-1)},
    ),
    Case(
        "regularisers",
        sequential(
            dense(5, "tanh", kernel_regularizer="l2", activity_regularizer="l1"),
            lambda: layers.ActivityRegularization(0.1),
            dense(2, bias_regularizer="l1"),
        ),
        (X, TARGETS),
    ),
    Case(
        "noise",
        sequential(
            lambda: layers.GaussianNoise(0.3),
            dense(8, "selu"),
            lambda: layers.AlphaDropout(0.3),
            lambda: layers.GaussianDropout(0.3),
            dense(2),
        ),
        (X, TARGETS),
    ),
    Case("shared", shared, (X, TARGETS)),
    Case("tied", Tied, (WORDS, WORDS), lambda: {"loss": crossentropy()}),
    Case("frozen", frozen, (X, TARGETS)),
    Case("mixture", sequential(Mixture, dense(2)), (X, TARGETS)),
    Case("bfloat16", in_policy("bfloat16"), (X, TARGETS)),
    Case("mixed_bfloat16", in_policy("mixed_bfloat16"), (X, TARGETS)),
    Case(
        "mixed_float16",
        in_policy("mixed_float16"),
        (X, TARGETS),
        lambda: {"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())},
    ),
    Case("float64", in_policy("float64"), (X, TARGETS)),
    Case(
        "clipped Adam with EMA",
        sequential(dense(5, "relu"), dense(2)),
        (X, TARGETS),
        lambda: {"optimizer": keras.optimizers.Adam(clipnorm=0.1, use_ema=True)},
    ),
]
if available("values in call"):
    EXACT.append(
        Case(
            "needs values",
            NeedsValues,
            (X, TARGETS),
            lambda: {"run_eagerly": True, "metrics": ["mae"]},
        )
    )


def made(model, **options):
    """A model from a fixed seed, compiled."""
    keras.utils.set_random_seed(1)
    found = model()
    found.compile(**{"optimizer": "adam", "loss": "mse"} | options)
    return found
