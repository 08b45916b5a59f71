"""Two replicas on two logical CPUs, and cases that they train as one device does.

Of 17 rows in batches of 16 the last one leaves the second replica without any.
"""

from functools import cache

import keras
import tensorflow as tf
from keras import layers, optimizers
from tests.keras.problems import (
    FEATURES,
    ROW_WEIGHTS,
    TOKEN_LABELS,
    TOKEN_WEIGHTS,
    WORD_IDS,
    X,
    classifier,
    compiled,
    crossentropy,
    tagger,
)
from tests.keras.problems import LABELS as CLASSES
from tests.keras.problems import TARGETS as NUMBERS
from tests.keras.training import Case, train

ROWS, BATCH = 17, 16
FIT = {"batch_size": BATCH}
SIZE = {"microbatch_size": 3}


@cache
def strategy():
    """The only one: those of one process would count their collectives from the same number."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def on_replicas(case, accumulated=True):
    """The run of a case on two replicas."""
    return train(case, accumulated, strategy().scope)


def case(name, model, compile, x, y, fit=None, **options):
    options = {"sizes": SIZE, "rows": ROWS} | options
    return Case(name, model, compile, x, y, FIT | (fit or {}), **options)


class Sixteens(keras.utils.PyDataset):
    """Batches of nested arrays."""

    def __init__(self, *arrays):
        super().__init__()
        self._arrays = arrays

    def __len__(self):
        return -(-ROWS // BATCH)

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return keras.tree.map_structure(lambda array: array[rows], self._arrays)


class Adds(layers.Layer):
    """Adds a mean over rows to the loss, and one number of its weights."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", regularizer="l2")

    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(inputs**2))
        return inputs * self.scale


class OwnLoss(keras.Model):
    """A loss of Keras' parts, which knows of replicas, and of a part that does not."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(2)
        self.other = keras.losses.MeanSquaredError()

    def call(self, inputs):
        return self.out(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        found = super().compute_loss(x, y, y_pred, sample_weight, training)
        return found + 0.3 * self.other(y, y_pred) + keras.ops.mean(keras.ops.abs(y_pred))


def regression(*first):
    return keras.Sequential([keras.Input((FEATURES,)), *first, layers.Dense(2)])


def two_outputs():
    inputs = keras.Input((FEATURES,))
    hidden = layers.Dense(4, activation="tanh")(inputs)
    return keras.Model(
        inputs, [layers.Dense(2, name="a")(hidden), layers.Dense(3, name="b")(hidden)]
    )


def frozen():
    model = classifier()
    model.trainable = False
    return model


def squares(optimizer=lambda: "sgd", **options):
    return compiled(optimizer=optimizer, loss="mse", metrics=["mae"], **options)


TWO_OUTPUTS = case(
    "two outputs, scaled loss, clipped",
    two_outputs,
    compiled(
        optimizer=lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.1, clipvalue=0.01)),
        loss=lambda: ["mse", crossentropy()],
        metrics=lambda: [["mae"], ["accuracy"]],
        loss_weights=lambda: [1.0, 0.3],
    ),
    lambda: Sixteens(X[:ROWS], (NUMBERS[:ROWS], CLASSES[:ROWS])),
    None,
)
CASES = [
    case(
        "AdamW, EMA, clipped, L2, sample weights",
        lambda: classifier(kernel_regularizer="l2"),
        compiled(
            optimizer=lambda: optimizers.AdamW(
                0.05, weight_decay=0.1, use_ema=True, ema_momentum=0.9, global_clipnorm=0.1
            ),
            weighted_metrics=lambda: ["accuracy"],
        ),
        X,
        CLASSES,
        {"sample_weight": ROW_WEIGHTS},
    ),
    case(
        "masked tokens with weights, an embedding, clipped",
        tagger,
        compiled(
            optimizer=lambda: optimizers.Adam(0.05, clipnorm=0.05),
            loss=lambda: crossentropy(reduction="mean_with_sample_weight"),
            weighted_metrics=lambda: ["accuracy"],
        ),
        WORD_IDS,
        TOKEN_LABELS,
        {"sample_weight": TOKEN_WEIGHTS},
    ),
]
FURTHER = [
    case(
        "an overridden compute_loss",
        OwnLoss,
        squares(),
        X,
        NUMBERS,
        sizes=SIZE | {"gather": False},
    ),
    case(
        "added losses, several batches per call",
        lambda: regression(Adds()),
        squares(steps_per_execution=2),
        X,
        NUMBERS,
    ),
    case(
        "rows of a replica at once",
        regression,
        squares(),
        X,
        NUMBERS,
        sizes={"microbatch_size": 50},
    ),
    case("one row at once", regression, squares(), X, NUMBERS, sizes={"microbatch_size": 1}),
    case("micro-batches", regression, squares(), X, NUMBERS, sizes={"accumulation_steps": 3}),
    case(
        "both sizes",
        regression,
        squares(),
        X,
        NUMBERS,
        sizes={"accumulation_steps": 3, "microbatch_size": 3},
    ),
    case(
        "class weights",
        classifier,
        compiled(),
        X,
        CLASSES,
        {"class_weight": {0: 1.0, 1: 0.2, 2: 3.0}},
    ),
    case("compiled", regression, squares(jit_compile=True), X, NUMBERS),
    case(
        "a schedule",
        regression,
        squares(lambda: optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5))),
        X,
        NUMBERS,
    ),
    case(
        "global norms of a scaled loss",
        regression,
        # Slots of Adam would be named otherwise where Keras builds it.
        squares(lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.1, global_clipnorm=0.1))),
        X,
        NUMBERS,
    ),
    case("nothing to train", frozen, compiled(), X, CLASSES),
]
