"""The models of a comparison in Keras, on any of its backends."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from virtualbatch.bench.case import CLASSES, EPSILON, LENGTH, RATE, SHARPNESS, WORDS, Case


def _mlp(width: int) -> keras.Model:
    return keras.Sequential(
        [
            layers.Input((64,)),
            layers.Dense(width, activation="relu"),
            layers.Dense(width, activation="relu"),
            layers.Dense(CLASSES),
        ]
    )


def _cnn(width: int) -> keras.Model:
    return keras.Sequential(
        [
            layers.Input((16, 16, 1)),
            layers.Conv2D(width, 3, activation="relu", padding="same"),
            layers.Conv2D(2 * width, 3, activation="relu", padding="same"),
            layers.MaxPooling2D(),
            layers.Conv2D(2 * width, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )


def _transformer(width: int) -> keras.Model:
    inputs = x = layers.Input((LENGTH, width))
    for _ in range(2):
        x = x + layers.MultiHeadAttention(4, width // 4)(x, x)
        x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x)))


def _tokens(width: int) -> keras.Model:
    return keras.Sequential(
        [
            layers.Input((LENGTH,), dtype="int32"),
            layers.Embedding(WORDS, width, mask_zero=True),
            layers.Dense(4 * width, activation="relu"),
            layers.Dense(CLASSES),
        ]
    )


def _pairs(width: int) -> keras.Model:
    encode = _transformer(width)
    views = [layers.Input((LENGTH, width)) for _ in range(2)]
    return keras.Model(views, layers.Concatenate()([encode(view) for view in views]))


_MODELS: dict[str, Callable[[int], keras.Model]] = {
    "MLP": _mlp,
    "CNN": _cnn,
    "transformer": _transformer,
    "tokens": _tokens,
    "pairs": _pairs,
}


def model_of(case: Case) -> keras.Model:
    """The model of a case. Every call gives the same weights."""
    keras.utils.set_random_seed(0)
    return _MODELS[case.model](case.width)


def adam(accumulation_steps: int | None = None) -> keras.optimizers.Optimizer:
    """The optimizer of every case.

    Args:
        accumulation_steps: for Keras' own accumulation; None for no accumulation.
    """
    return keras.optimizers.Adam(
        RATE, epsilon=EPSILON, gradient_accumulation_steps=accumulation_steps
    )


def cross_entropy() -> keras.losses.Loss:
    """The loss of every case but `pairs`. It divides by rows, or by unmasked tokens."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def contrastive(embeddings: Any) -> Any:
    """The mean loss of each row's first view against all second views.

    Args:
        embeddings: the embeddings of both views side by side, (rows, 2 * features).
    """
    first, second = (
        keras.ops.normalize(view, axis=1) for view in keras.ops.split(embeddings, 2, axis=1)
    )
    logits = SHARPNESS * keras.ops.matmul(first, keras.ops.transpose(second))
    rows = keras.ops.arange(keras.ops.shape(logits)[0])
    losses = keras.losses.sparse_categorical_crossentropy(rows, logits, from_logits=True)
    return keras.ops.mean(losses)
