"""Losses that couple rows equal plain Keras on the whole batch; see `tests.keras.coupled`."""

import keras
import numpy as np
import pytest
from keras import layers
from tests.keras import coupled
from tests.keras.backends import supported
from tests.keras.coupled import CASES, HEADS, MASKS, MICRO, TAGS_AND_MASKS, TEMPERATURE, X
from tests.keras.training import Case, assert_equals_keras, in_tiers, train
from tests.oracle import assert_close

import virtualbatch.keras as vb
from virtualbatch.keras._window import WindowModel

REASON = "another coupled loss on the same path"


@pytest.mark.parametrize(
    "case",
    in_tiers(
        [TEMPERATURE, HEADS],
        supported([TAGS_AND_MASKS, *(x for x in CASES if x not in (TEMPERATURE, HEADS))]),
        REASON,
    ),
)
def test_equals_keras(case):
    """Weights, logs and their keys, over batches that are cut evenly and are not."""
    # A graph weighs the losses of several outputs by the batch, not by its rows.
    assert_equals_keras(case, in_its_mode=case in (HEADS, TAGS_AND_MASKS))
