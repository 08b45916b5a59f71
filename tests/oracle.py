"""How results are compared: by a derived tolerance, and by helpers that raise."""

from collections.abc import Sequence
from typing import Any

import numpy as np

EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
# What is asked of float64 in every test, whatever the number of summands.
EXACT = 1e-12


def tolerance(dtype: str, summands: int) -> float:
    """Relative error that a sum may have, however it is grouped.

    Any order of adding n numbers is off by at most (n - 1) epsilon times the sum of their sizes
    (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2); two such sums, and one
    rounding of each summand, make it 3 n epsilon.

    Args:
        dtype: in which the sum was formed.
        summands: numbers that meet in one entry of the result.
    """
    return 3 * summands * EPSILON[dtype]


def assert_close(actual: Any, expected: Any, rtol: float = EXACT) -> None:
    """Raises unless two arrays agree, measured against the largest entry of the expected one.

    Raises:
        AssertionError: shapes differ, something is not finite, or an entry is off by more.
    """
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape} instead of {expected.shape}")
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        raise AssertionError(f"not finite: {actual} instead of {expected}")
    if actual.size == 0:
        return
    off = np.abs(actual - expected).max()
    allowed = rtol * np.abs(expected).max()
    if off > allowed:
        raise AssertionError(f"off by {off:.3g}, allowed {allowed:.3g}: {actual} for {expected}")


def assert_all_close(actual: Sequence[Any], expected: Sequence[Any], rtol: float = EXACT) -> None:
    """The same for lists of arrays, in which None agrees with None only.

    Raises:
        AssertionError: lengths differ, None meets an array, or two arrays differ.
    """
    if len(actual) != len(expected):
        raise AssertionError(f"{len(actual)} arrays instead of {len(expected)}")
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if (a is None) != (b is None):
            raise AssertionError(f"entry {index}: {a} instead of {b}")
        if a is None:
            continue
        try:
            assert_close(a, b, rtol)
        except AssertionError as error:
            raise AssertionError(f"entry {index}: {error}") from None
