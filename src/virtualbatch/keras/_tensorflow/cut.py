"""A batch of `fit` on TensorFlow, cut by rows, and predictions of all of its rows, cut with it."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._rows import unstretched
from virtualbatch.tensorflow._batch import segments
from virtualbatch.tensorflow._segment import Segment


class Cut:
    """A batch, cut by one of two sizes.

    Args:
        batch: (x, y, sample_weight).
        size: rows of a micro-batch, or None.
        steps: micro-batches, or None.
    """

    def __init__(self, batch: Any, size: int | None, steps: int | None):
        self._batch, self._by = batch, (size, steps)

    def segments(self) -> list[Segment]:
        """The micro-batches."""
        return segments(self._batch, *self._by)

    def segments_with(self, arrays: Sequence[Any], trimmed: Sequence[bool]) -> list[Segment]:
        """The same, each as (micro-batch, rows of arrays that have those of the batch)."""
        del trimmed
        return segments((self._batch, list(arrays)), *self._by)

    def trimmed(self, gathering: Gathering, outputs: int) -> list[bool]:
        """For each of so many gathered predictions, whether it has the length of trimmed rows."""
        del gathering
        return [False] * outputs

    def lengthened(self, array: Any, trimmed: bool) -> Any:
        """Rows of a micro-batch as long as those of the batch."""
        del trimmed
        return array

    def in_order(self, array: Any) -> Any:
        """Rows of all micro-batches in the order of the batch."""
        return tf.identity(array)

    def stretch(self, microbatch: Any) -> Any:
        """See `Rows`."""
        return unstretched(microbatch)
