"""A batch of `fit` on TensorFlow, packed: sorted, cut and trimmed inside the graph.

A graph takes any shape, so one trace serves all micro-batches. But XLA compiles each shape. With
XLA, rows are trimmed to a few lengths, and all micro-batches but the last have the same number of
rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._gather.gathering import Gathering, chosen_of
from virtualbatch.keras._packing import (
    FEW_LENGTHS,
    Packing,
    checked_lengths,
    padded_batch,
    trimmed_outputs,
)
from virtualbatch.keras._rows import unstretched
from virtualbatch.tensorflow._arrays import as_tensor
from virtualbatch.tensorflow._segment import Segment


class PackedCut:
    """A batch, cut by tokens; see `virtualbatch.keras._tensorflow.cut.Cut`.

    Args:
        model: the model.
        batch: (x, y, sample_weight) as Keras' loaders give them.
        packing: how rows are packed.
        rows: rows of the batch; 0 if its one row is a filler. None if it cannot have a filler.
    """

    def __init__(self, model: keras.Model, batch: Any, packing: Packing, rows: Any = None):
        self._model = model
        batch = tf.nest.map_structure(as_tensor, batch)
        self._found = found = padded_batch(model, batch)
        self._first = found.trimmed.index(True)
        self._rows, self._padded = tf.unstack(tf.shape(found.leaves[self._first])[:2])
        lengths = tf.cast(
            checked_lengths(packing.lengths(batch[0]), found.leaves[self._first].shape[0]), tf.int32
        )
        if rows is not None:
            # A filler counts as one token, whatever the length of its axis.
            lengths = tf.where(rows > 0, lengths, 1)
            self._padded = tf.where(rows > 0, self._padded, 1)
        with tf.control_dependencies(self._checks(lengths)):
            self._order = tf.argsort(lengths, direction="DESCENDING", stable=True)
        self._source = found.mapped(lambda leaf, trimmed: tf.gather(leaf, self._order))
        lengths = tf.gather(lengths, self._order)
        if model.jit_compile:
            step = tf.maximum(1, (self._padded + FEW_LENGTHS - 1) // FEW_LENGTHS)
            lengths = tf.minimum((lengths + step - 1) // step * step, self._padded)
            most = tf.maximum(1, packing.tokens // self._padded)
            self._starts = tf.range(0, self._rows, most)
        else:
            self._starts = _starts(lengths, packing.tokens)
        self._lengths = lengths
        self._stops = tf.concat([self._starts[1:], [self._rows]], 0)

    def segments(self) -> list[Segment]:
        """The micro-batches, longest rows first."""
        return self._segments(self._source, self._batch_of)

    def segments_with(self, arrays: Sequence[Any], trimmed: Sequence[bool]) -> list[Segment]:
        """The micro-batches, each as (micro-batch, the rows of `arrays` that belong to it).

        Args:
            arrays: arrays of all rows, in the order of the batch.
            trimmed: for each array, whether it is trimmed like the micro-batch.
        """

        def cut(source: Any, i: Any) -> Any:
            batch, arrays = source
            pairs = zip(arrays, trimmed, strict=True)
            return self._batch_of(batch, i), [self._piece(i, x, short) for x, short in pairs]

        source = self._source, [tf.gather(array, self._order) for array in arrays]
        return self._segments(source, cut)

    def trimmed(self, gathering: Gathering, outputs: int) -> list[bool]:
        """For each gathered prediction, whether it is trimmed with the rows."""
        del outputs
        return chosen_of(trimmed_outputs(self._model, self._found), gathering)

    def lengthened(self, array: Any, trimmed: bool) -> Any:
        """The rows of a micro-batch, padded with zeros to their length before trimming."""
        if not trimmed:
            return array
        missing = self._padded - tf.shape(array)[1]
        padding = [[0, 0], [0, missing], *([0, 0] for _ in array.shape[2:])]
        found = tf.pad(array, padding)
        found.set_shape([array.shape[0], None, *array.shape[2:]])
        return found

    def in_order(self, array: Any) -> Any:
        """The rows of all micro-batches, put in the order of the batch."""
        return tf.gather(array, tf.argsort(self._order))

    def stretch(self, microbatch: Any) -> Any:
        """See `Rows`."""
        if not self._found.targets:
            return unstretched(microbatch)
        length = tf.shape(self._found.like(microbatch).leaves[self._first])[1]
        return tf.cast(self._padded, tf.float64) / tf.cast(length, tf.float64)

    def _checks(self, lengths: Any) -> list[Any]:
        rows, padded = self._rows, self._padded
        fits = tf.debugging.Assert(
            tf.reduce_all((lengths >= 1) & (lengths <= padded)) & tf.equal(tf.size(lengths), rows),
            [
                "No length may exceed the padded axis or be below 1, and there is one for each "
                "row. Got",
                tf.size(lengths),
                "lengths from",
                tf.reduce_min(lengths),
                "to",
                tf.reduce_max(lengths),
                "for",
                rows,
                "rows padded to",
                padded,
                ". Return the lengths after truncation.",
            ],
            summarize=1,
        )
        return [] if fits is None else [fits]

    def _batch_of(self, source: Any, i: Any) -> Any:
        found = self._found.like(source)
        return found.mapped(lambda leaf, trimmed: self._piece(i, leaf, trimmed))

    def _piece(self, i: Any, leaf: Any, trimmed: bool) -> Any:
        piece = leaf[self._starts[i] : self._stops[i]]
        if not trimmed:
            return piece
        piece = piece[:, : self._lengths[self._starts[i]]]
        piece.set_shape([None, None, *leaf.shape[2:]])
        return piece

    def _segments(self, source: Any, cut: Callable[[Any, Any], Any]) -> list[Segment]:
        def rows(i: Any) -> Any:
            return self._stops[i] - self._starts[i]

        def one(i: int) -> Segment:
            return Segment(1, source, lambda source, _: cut(source, i), lambda _: rows(i))

        count = tf.size(self._starts)
        if tf.executing_eagerly():
            return [one(i) for i in range(int(count))]
        return [Segment(count, source, cut, rows)]


def _starts(lengths: Any, tokens: int) -> Any:
    """The first row of each micro-batch. `lengths` are sorted, longest first."""

    def body(start: Any, count: Any, starts: Any) -> Any:
        size = tf.maximum(1, tokens // lengths[start])
        return start + size, count + 1, starts.write(count, start)

    starts = tf.TensorArray(tf.int32, size=0, dynamic_size=True)
    *_, starts = tf.while_loop(lambda start, *_: start < tf.size(lengths), body, (0, 0, starts))
    return starts.stack()
