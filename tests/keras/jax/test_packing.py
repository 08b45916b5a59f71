"""Packed batches on JAX: a program of four lengths, whatever the data."""

import pytest
from tests.keras.packing import IDS, LABELS, counting, length_of, tagger
from tests.keras.problems import compiled
from tests.keras.training import Case, assert_equals_keras


@pytest.mark.thorough("compiles a program for each length; test_program.py counts traces too")
def test_four_lengths_are_traced_whatever_the_data():
    model, calls = counting()
    model.fit(IDS[:60], LABELS[:60], batch_size=10, verbose=0, shuffle=False)
    once = list(calls)
    model.fit(IDS[60:120], LABELS[60:120], batch_size=10, epochs=2, verbose=0)
    assert calls == once
    # 40 tokens are five rows padded to 7; a quarter of 7 is rounded up to 2.
    packed = [shape for shape in once if shape[0] == 5]
    assert set(packed) == {(5, length, 4) for length in (2, 4, 6, 7)}
    # The mask is counted by one forward more.
    assert len(packed) == 8


@pytest.mark.thorough("trains once more on packed rows")
def test_lengths_beyond_the_padded_axis_trim_nothing():
    # A program does not read values, so it cannot refuse them.
    lengths = {"microbatch_tokens": 40, "lengths": lambda ids: 100 * length_of(ids)}
    assert_equals_keras(Case("", tagger, compiled(metrics=[]), IDS, LABELS, {}, lengths))
