"""Models whose losses couple rows, each with what plain Keras trains it on.

Batches of 20, 20 and 10 rows, micro-batches of 7, three epochs of Adam.
"""

import keras
import numpy as np
from keras import layers, ops
from tests.keras.backends import BACKEND
from tests.keras.training import Case

_random = np.random.default_rng(0)
ROWS, FEATURES, MICRO = 50, 12, 7
X, U = _random.normal(size=(ROWS, FEATURES)), _random.normal(size=(ROWS, FEATURES))
CLASSES = _random.integers(0, 4, ROWS)
MASKS = (_random.random((ROWS, 6)) < 0.4).astype("float64")
VALUES = _random.normal(size=(ROWS, 1))
WEIGHTS = _random.uniform(0.2, 2, ROWS)
WORDS = np.where(
    np.arange(7) < _random.integers(2, 8, (ROWS, 1)), _random.integers(1, 20, (ROWS, 7)), 0
)
TAGS = _random.integers(0, 3, (ROWS, 7))
# XLA, which Keras takes where it can, would compile on TensorFlow for as long as all else takes.
UNOPTIMISED = {"jit_compile": False} if BACKEND == "tensorflow" else {}
TAG_WEIGHTS = np.repeat(WEIGHTS[:, None], 7, 1)


def _matched(logits):
    """Cross-entropy of rows that belong to the column of their number."""
    return ops.mean(ops.logsumexp(logits, 1) - ops.diagonal(logits))


def unit(x):
    return x / ops.sqrt(ops.sum(ops.square(x), 1, keepdims=True))


def clip(y_true, y_pred):
    """Both directions of a contrastive loss: one number."""
    logits = 3.0 * ops.matmul(unit(y_pred[:, :8]), ops.transpose(unit(y_pred[:, 8:])))
    return (_matched(logits) + _matched(ops.transpose(logits))) / 2


def among_others(y_true, y_pred):
    """One direction of it: a value per row, each of which is made of all rows."""
    a, b = unit(y_pred[:, :8]), unit(y_pred[:, 8:])
    return ops.logsumexp(3.0 * ops.matmul(a, ops.transpose(b)), 1) - 3.0 * ops.sum(a * b, 1)


def barlow(y_true, y_pred):
    a, b = ((x - ops.mean(x, 0)) / ops.std(x, 0) for x in (y_pred[:, :8], y_pred[:, 8:]))
    rows = ops.cast(ops.shape(y_pred)[0], y_pred.dtype)
    same = ops.eye(8, dtype=y_pred.dtype)
    off = ops.square(ops.matmul(ops.transpose(a), b) / rows - same)
    return ops.sum(off * (same + 5e-3 * (1 - same)))


def correlation(y_true, y_pred):
    a, b = y_pred - ops.mean(y_pred), y_true - ops.mean(y_true)
    return 1 - ops.sum(a * b) / ops.sqrt(ops.sum(a * a) * ops.sum(b * b))


def weighted_mean(y_true, y_pred):
    weights = ops.abs(y_true)
    return ops.sum(weights * ops.square(y_pred - y_true)) / ops.sum(weights)


def largest(y_true, y_pred):
    """A metric of one number."""
    return ops.max(y_pred)


def mlp(outputs, activation=None, bias=True, **options):
    """Options are those of the hidden layer."""

    def made():
        return keras.Sequential(
            [
                keras.Input((FEATURES,)),
                layers.Dense(16, activation="tanh", **options),
                layers.Dense(outputs, activation=activation, use_bias=bias),
            ]
        )

    return made


def regularised():
    l2 = keras.regularizers.L2(1e-2)
    return mlp(6, "sigmoid", kernel_regularizer="l2", activity_regularizer=l2)()


def towers():
    inputs = keras.Input((FEATURES,)), keras.Input((FEATURES,))
    encoded = [layers.Dense(8)(layers.Dense(16, activation="tanh")(x)) for x in inputs]
    return keras.Model(inputs, layers.Concatenate()(encoded))


class Temperature(keras.Model):
    """A loss with a variable of its own, which weighs what layers add."""

    def __init__(self):
        super().__init__()
        self.encoder = mlp(16, activity_regularizer="l2", kernel_regularizer="l2")()
        self.temperature = self.add_weight(shape=(), initializer="ones", name="temperature")

    def call(self, x):
        return self.encoder(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        scale = ops.exp(self.temperature)
        logits = scale * ops.matmul(unit(y_pred[:, :8]), ops.transpose(unit(y_pred[:, 8:])))
        return _matched(logits) + 0.1 * sum(self.losses)


def three_heads():
    inputs = keras.Input((FEATURES,))
    hidden = layers.Dense(16, activation="tanh")(inputs)
    heads = {
        "embedded": layers.Dense(16)(hidden),
        "segmented": layers.Dense(6, activation="sigmoid")(hidden),
        "valued": layers.Dense(1)(hidden),
    }
    return keras.Model(inputs, heads)


def tagger_and_masks():
    """An output for each word, with masks, beside one for each row."""
    inputs = keras.Input((7,), dtype="int32")
    words = layers.Embedding(20, 8, mask_zero=True)(inputs)
    tags = layers.Dense(3)(layers.Dense(8, activation="tanh")(words))
    rows = layers.Dense(6, activation="sigmoid")(layers.GlobalAveragePooling1D()(words))
    return keras.Model(inputs, [tags, rows])


def tagger():
    inputs = keras.Input((7,), dtype="int32")
    words = layers.Embedding(20, 8, mask_zero=True)(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(8, activation="tanh")(words)))


def crossentropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def coupled(name, model, loss, x, y, *, sizes=None, fit=None, needs=(), **options):
    """A case of `tests.keras.training`; loss and options of `compile` are made for each run."""

    def arguments():
        given = {name: value() if callable(value) else value for name, value in options.items()}
        return {"optimizer": keras.optimizers.Adam(1e-2), "loss": loss()} | UNOPTIMISED | given

    return Case(
        name,
        model,
        arguments,
        x,
        y,
        {"batch_size": 20, "epochs": 3} | (fit or {}),
        {"microbatch_size": MICRO} | (sizes or {}),
        needs,
        ROWS,
    )


HEADS = coupled(
    "three outputs, two of them coupled",
    three_heads,
    lambda: {"embedded": clip, "segmented": keras.losses.Dice(), "valued": "mse"},
    X,
    {"embedded": VALUES, "segmented": MASKS, "valued": VALUES},
    loss_weights=lambda: {"embedded": 1.0, "segmented": 2.0, "valued": 0.5},
    metrics=lambda: {"segmented": [largest], "valued": ["mae"]},
)
TEMPERATURE = coupled("a variable in compute_loss", Temperature, lambda: None, X, VALUES)
TAGS_AND_MASKS = coupled(
    "masked words beside Dice",
    tagger_and_masks,
    lambda: [crossentropy(), keras.losses.Dice()],
    WORDS,
    [TAGS, MASKS],
    fit={"sample_weight": [TAG_WEIGHTS, WEIGHTS]},
    weighted_metrics=lambda: [["accuracy"], ["mae"]],
    needs=("masked metrics", "masked weights in metrics"),
)
CASES = [
    coupled("Dice", mlp(6, "sigmoid"), keras.losses.Dice, X, MASKS),
    coupled("Tversky", mlp(6, "sigmoid"), keras.losses.Tversky, X, MASKS),
    coupled("Circle", mlp(8), keras.losses.Circle, X, CLASSES),
    coupled("contrastive, two inputs", towers, lambda: clip, [X, U], VALUES),
    coupled(
        "a value per row", mlp(16), lambda: among_others, X, VALUES, fit={"sample_weight": WEIGHTS}
    ),
    # Its value does not change with a bias, whose gradient would be rounding that Adam divides.
    coupled("Barlow Twins", mlp(16, bias=False), lambda: barlow, X, VALUES),
    coupled(
        "correlation",
        mlp(1, bias=False),
        lambda: correlation,
        X,
        VALUES,
        metrics=lambda: [keras.metrics.PearsonCorrelation(axis=0), largest],
    ),
    coupled("a weighted mean", mlp(1), lambda: weighted_mean, X, VALUES),
    TEMPERATURE,
    HEADS,
    coupled("regularisers", regularised, keras.losses.Dice, X, MASKS, metrics=lambda: ["mae"]),
    coupled(
        "masked words, none coupled",
        tagger,
        crossentropy,
        WORDS,
        TAGS,
        fit={"sample_weight": TAG_WEIGHTS},
        metrics=lambda: ["accuracy"],
    ),
]
