"""Data and models that several tests share. Sizes are small: tracing is what takes the time."""

import keras
import numpy as np
from keras import layers
from tests.keras.training import ROWS

_random = np.random.default_rng(0)

FEATURES, CLASSES, TOKENS, WORDS = 6, 3, 7, 5

X = _random.normal(size=(ROWS, FEATURES))
LABELS = _random.integers(0, CLASSES, size=ROWS)
TARGETS = _random.normal(size=(ROWS, 2))
ROW_WEIGHTS = _random.random(ROWS)

# Sentences of 1 to 7 words, padded by 0; rows 16 to 31 are a micro-batch without any word.
LENGTHS = _random.integers(1, TOKENS + 1, size=ROWS)
LENGTHS[16:32] = 0
WORD_IDS = _random.integers(1, WORDS, size=(ROWS, TOKENS)) * (np.arange(TOKENS) < LENGTHS[:, None])
# The same, but for other words masked.
OTHER_IDS = WORD_IDS[::-1].copy()
TOKEN_LABELS = _random.integers(0, CLASSES, size=(ROWS, TOKENS))
TOKEN_WEIGHTS = _random.random((ROWS, TOKENS))

SERIES = _random.normal(size=(ROWS, TOKENS, 4))
SERIES[LENGTHS[:, None] <= np.arange(TOKENS)] = 0.0
IMAGES = _random.normal(size=(ROWS, 6, 6, 2))


def crossentropy(**options):
    """The loss that most cases use."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def compiled(**options):
    """Arguments of `compile`; values that are functions are called for each run."""

    def arguments():
        given = {"optimizer": "sgd", "loss": crossentropy, "metrics": ["accuracy"]} | options
        return {
            name: value() if callable(value) and not isinstance(value, type) else value
            for name, value in given.items()
        }

    return arguments


def classifier(**options):
    """Rows of numbers -> logits; options are those of the hidden layer."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(4, activation="tanh", **options),
            layers.Dense(CLASSES),
        ]
    )


def tagger(mask_zero=True):
    """Word ids -> logits per token, masked where there is no word."""
    return keras.Sequential(
        [
            keras.Input((TOKENS,), dtype="int32"),
            layers.Embedding(WORDS, 4, mask_zero=mask_zero),
            layers.Dense(CLASSES),
        ]
    )
