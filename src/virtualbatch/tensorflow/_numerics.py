"""Explains an error of TensorFlow's own NaN check in a micro-batch of weight 0."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from virtualbatch.window.shares import Shares

# The beginning of an error of `tf.debugging.enable_check_numerics`.
_FOUND = "Detected Infinity or NaN"


@contextmanager
def explained_numerics(shares: Shares, index: Any) -> Iterator[None]:
    """A context in which a micro-batch runs.

    A mean over nothing is NaN. Normally that NaN is dropped, but TensorFlow's NaN check raises for
    it. Eagerly this context explains the error. In a graph the error is raised when the graph runs,
    in TensorFlow's words.

    Args:
        shares: the shares of the window.
        index: the number of the micro-batch.

    Raises:
        ValueError: TensorFlow found NaN where a term of the micro-batch has no weight.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        if not tf.executing_eagerly() or _FOUND not in str(error):
            raise
        empty = [name for name, found in (shares.terms or {}).items() if not found[index]]
        if not empty:
            raise
        raise ValueError(
            "While TensorFlow checks numerics, a mean over nothing must be finite. Got NaN in "
            f"micro-batch {index}, whose weight is 0. Divide by tf.math.divide_no_nan(total, "
            "weight)."
        ) from error
