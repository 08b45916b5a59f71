"""Losses that see all rows, on two replicas: `fit` trains as one device does on the whole batch."""

import pytest
from tests.keras.coupled import CASES, HEADS, TAGS_AND_MASKS, TEMPERATURE
from tests.keras.tensorflow.replicas import on_replicas
from tests.keras.training import assert_same_run, eagerly, in_tiers, train

SLOW = "each traces a model twice for each of two replicas"

@pytest.mark.parametrize("case", in_tiers([], [TAGS_AND_MASKS, *CASES], SLOW))
def test_equals_one_device(case):
    # A graph weighs the losses of several outputs by the batch, not by its rows.
    in_its_mode = case in (HEADS, TAGS_AND_MASKS)
    expected = train(case if in_its_mode else eagerly(case), accumulated=False)
    assert_same_run(on_replicas(case), expected)
