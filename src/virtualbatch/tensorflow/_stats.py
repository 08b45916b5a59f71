"""Statistics of a window's gradient noise: the squared norm of each gradient."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.window.shares import Shares, accumulator_dtype


def part_of(gradients: Sequence[Any], share: Any) -> Any:
    """A micro-batch's part of the window's `mean_square`.

    Args:
        gradients: the micro-batch's share of the gradients: tensors, IndexedSlices or None.
        share: the share, a scalar; 0 if the micro-batch counts for nothing.

    Returns:
        Share times squared norm of the micro-batch's own gradient; a scalar.
    """
    total = squared_norm(gradients)
    return tf.math.divide_no_nan(total, tf.cast(share, total.dtype))


def counted(shares: Shares) -> Any:
    """The number of micro-batches of a window that have a share."""
    return tf.math.count_nonzero(shares.of_rows_or_term(), dtype=tf.int32)


def stats_of(
    gradients: Sequence[Any], rows: Any, microbatches: Any, mean_square: Any
) -> WindowStats:
    """The statistics of a window.

    Args:
        gradients: the gradients of the window.
        rows: the rows of the window, or the total weight that replaces them.
        microbatches: the number that `counted` gives.
        mean_square: the sum of `part_of` over micro-batches.
    """
    square = tf.cast(squared_norm(gradients), mean_square.dtype)
    return WindowStats(rows, microbatches, mean_square, square)


def squared_norm(gradients: Sequence[Any]) -> Any:
    """Sum of squares of all entries, in float32 or wider."""
    values = [summed(gradient) for gradient in gradients if gradient is not None]
    # One kernel, which does not store the squares. A product and a sum would store them.
    halves = [tf.nn.l2_loss(_wide(x)) for x in values]
    dtype = max((x.dtype for x in halves), key=lambda dtype: dtype.size, default=tf.float32)
    return 2 * tf.add_n([tf.cast(x, dtype) for x in halves]) if halves else tf.zeros([], dtype)


def _wide(x: Any) -> Any:
    wide = tf.cast(x, accumulator_dtype(x.dtype.name))
    return tf.abs(wide) if wide.dtype.is_complex else wide


def summed(gradient: Any) -> Any:
    """The entries of a gradient in one tensor. Slices of the same row are added up."""
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.convert_to_tensor(gradient)
    rows, places = tf.unique(gradient.indices)
    return tf.math.unsorted_segment_sum(gradient.values, places, tf.size(rows))
