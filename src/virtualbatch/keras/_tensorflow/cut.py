"""Cuts a batch of `fit` on TensorFlow by rows, and arrays of all its rows in the same way."""

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
        """The micro-batches, each as (micro-batch, the rows of `arrays` that belong to it)."""
        del trimmed
        return segments((self._batch, list(arrays)), *self._by)

    def trimmed(self, gathering: Gathering, outputs: int) -> list[bool]:
        """For each gathered prediction, whether it is trimmed with the rows: none is here."""
        del gathering
        return [False] * outputs

    def lengthened(self, array: Any, trimmed: bool) -> Any:
        """The rows of a micro-batch. They have the length of the batch's rows already."""
        del trimmed
        return array

    def in_order(self, array: Any) -> Any:
        """The rows of all micro-batches, put in the order of the batch."""
        return tf.identity(array)

    def stretch(self, microbatch: Any) -> Any:
        """See `Rows`."""
        return unstretched(microbatch)
