"""Gives every replica the rows of all replicas.

Each replica puts its rows between zeros, and the results are summed over replicas. So the number of
reductions does not depend on how many arrays and rows there are.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.keras._gather.loss import not_of_rows
from virtualbatch.tensorflow._arrays import after
from virtualbatch.tensorflow._replicas import replica, replicas, summed, summed_gradients

# Dtypes whose values float32 holds exactly. A sum with zeros keeps them exact.
_SHORT = {
    *(tf.float32, tf.float16, tf.bfloat16),
    *(tf.bool, tf.int8, tf.uint8, tf.int16, tf.uint16),
}


class RowsOfReplicas:
    """How the rows of a batch are divided among replicas, in the order of the replicas.

    Args:
        everywhere: the number of rows on each replica, an int32 vector.
    """

    def __init__(self, everywhere: Any):
        self._everywhere = everywhere
        self._before = tf.reduce_sum(everywhere[: replica()])
        self.here = everywhere[replica()]
        self.count = tf.reduce_sum(everywhere)

    def own(self, array: Any) -> Any:
        """The rows of this replica in an array of all replicas' rows."""
        return array[self._before : self._before + self.here]

    def of_all(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays with the rows of all replicas, from those with the rows of this one.

        Args:
            arrays: tensors and Nones. All replicas pass the same ones in the same order. On a
                replica without rows, other axes may have any length.

        Raises:
            ValueError: an array does not hold numbers.
        """
        given = [array for array in arrays if array is not None]
        for array in given:
            if not (array.dtype.is_bool or array.dtype.is_floating or array.dtype.is_integer):
                raise ValueError(
                    "Arrays that a loss sees for the rows of all replicas must hold numbers. "
                    f"Got {array.dtype.name}. Encode them before fit, or pass gather=False, "
                    "if the loss is a mean over rows."
                )
        placed = [
            self._placed(array, lengths)
            for array, lengths in zip(given, self._lengths(given), strict=True)
        ]
        short = [array for array in placed if array.dtype in _SHORT]
        sums = iter(_summed_short(short))
        long = iter(summed([array for array in placed if array.dtype not in _SHORT]))
        found = iter([next(sums if array.dtype in _SHORT else long) for array in placed])
        return [None if array is None else next(found) for array in arrays]

    def _lengths(self, arrays: Sequence[Any]) -> list[Any]:
        """Shapes of arrays without their rows; readable if replicas agree on them."""
        ranks = [len(array.shape) for array in arrays]
        place = tf.one_hot(replica(), replicas(), dtype=tf.int32)
        local = tf.concat([tf.shape(array) for array in arrays], 0)
        (shapes,) = summed([place[:, None] * local[None]])
        most = tf.reduce_max(shapes, 0)
        counts_rows = [axis == 0 for rank in ranks for axis in range(rank)]
        rows = self._everywhere[:, None]
        agree = tf.logical_or(tf.equal(shapes, most), tf.equal(rows, 0))
        before, between, end = not_of_rows("COUNT", "COUNT").split("COUNT")
        counts = tf.boolean_mask(shapes, counts_rows, axis=1)
        checks = [
            tf.debugging.Assert(
                tf.reduce_all(tf.equal(counts, rows)),
                [before, counts, between, self._everywhere, end],
            ),
            tf.debugging.Assert(
                tf.reduce_all(tf.logical_or(agree, counts_rows)),
                [
                    "All arrays of replicas must have the same lengths where a loss sees all "
                    "rows. Got shapes",
                    shapes,
                    ". Pad the batches of all replicas alike.",
                ],
            ),
        ]
        return [shape[1:] for shape in tf.split(after(checks, most), ranks)]

    def _placed(self, array: Any, lengths: Any) -> Any:
        """The rows of this replica, with zeros in place of the other replicas' rows."""
        around = [[self._before, self.count - self._before - self.here]]
        missing = lengths - tf.shape(array)[1:]
        beside = tf.stack([tf.zeros_like(missing), missing], 1)
        found = tf.pad(array, tf.concat([around, beside], 0))
        found.set_shape([None, *array.shape[1:]])
        return found


def _summed_short(arrays: Sequence[Any]) -> list[Any]:
    """Sums arrays over all replicas, in one reduction of float32."""
    if not arrays:
        return []
    flat = [tf.reshape(tf.cast(array, tf.float32), [-1]) for array in arrays]
    (total,) = summed_gradients([tf.concat(flat, 0)])
    return [
        tf.ensure_shape(tf.cast(tf.reshape(piece, tf.shape(array)), array.dtype), array.shape)
        for piece, array in zip(tf.split(total, [tf.size(x) for x in flat]), arrays, strict=True)
    ]
