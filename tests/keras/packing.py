"""Ragged rows and models that take any length, for the tests of packed batches."""

import keras
import numpy as np
from keras import layers, ops
from tests.keras.problems import CLASSES, TOKENS, WORDS, crossentropy
from tests.keras.training import ROWS

import virtualbatch.keras as vb

_random = np.random.default_rng(5)
LENGTHS = _random.integers(2, TOKENS + 1, size=ROWS)
MASK = np.arange(TOKENS) < LENGTHS[:, None]
IDS = _random.integers(1, WORDS, size=(ROWS, TOKENS)) * MASK
LABELS = _random.integers(0, CLASSES, size=(ROWS, TOKENS))
WEIGHTS = _random.random((ROWS, TOKENS)) * MASK
ROW_LABELS = _random.integers(0, CLASSES, size=ROWS)


def length_of(ids):
    return ops.sum(ops.cast(ids != 0, "int32"), 1)


PACKED = {"microbatch_tokens": 40, "lengths": length_of}


def tagger(mask_zero=True):
    """Word ids of any length -> logits per token."""
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(WORDS, 4, mask_zero=mask_zero),
            layers.Dense(CLASSES),
        ]
    )


class Counting(layers.Layer):
    """Notes the shapes with which Python runs its call, once per trace."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.calls = []

    def call(self, inputs):
        self.calls.append(tuple(inputs.shape))
        return inputs


def counting(**options):
    """A model that accumulates, and the shapes that its trace sees."""
    counter = Counting()
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(WORDS, 4, mask_zero=True),
            counter,
            layers.Dense(CLASSES),
        ]
    )
    model.compile("sgd", crossentropy(), **options)
    vb.accumulate(model, **PACKED)
    counter.calls.clear()
    return model, counter.calls
