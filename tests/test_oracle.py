"""The guards themselves can fail."""

import numpy as np
import pytest
from tests.oracle import EXACT, assert_all_close, assert_close, tolerance

ONES = np.ones(3)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (ONES * (1 + 3 * EXACT), ONES),
        (ONES * np.nan, ONES),
        (ONES, ONES * np.nan),
        (ONES * np.nan, ONES * np.nan),
        (ONES * np.inf, ONES * np.inf),
        (1e-30, 0.0),
        (0.0, 1e-30),
        (np.ones(4), ONES),
        (1.0, ONES),
    ],
)
def test_assert_close_raises(actual, expected):
    with pytest.raises(AssertionError):
        assert_close(actual, expected)


def test_assert_close_accepts_rounding():
    assert_close(ONES * (1 + EXACT / 3), ONES)
    assert_close(np.zeros(2), np.zeros(2))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [([ONES], []), ([None], [ONES]), ([ONES], [None]), ([ONES, 2 * ONES], [ONES, ONES])],
)
def test_assert_all_close_raises(actual, expected):
    with pytest.raises(AssertionError):
        assert_all_close(actual, expected)


def test_assert_all_close_accepts_none_for_none():
    assert_all_close([None, ONES], [None, ONES])


def test_tolerance_holds_for_any_order_and_is_not_loose():
    numbers = np.random.default_rng(0).uniform(size=1000)
    exact = numbers.sum()
    forward, backward = (np.cumsum(x.astype(np.float32))[-1] for x in (numbers, numbers[::-1]))
    for total in (forward, backward):
        assert_close(total, exact, tolerance("float32", 1000))
    # One lost number is far outside.
    with pytest.raises(AssertionError):
        assert_close(exact - numbers.max(), exact, tolerance("float32", 1000))
