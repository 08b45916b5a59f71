"""A batch of `fit` on TensorFlow, packed: sorted, cut and trimmed inside the graph.

A graph takes any shape, so one trace serves all micro-batches. Where XLA compiles each shape, rows
are trimmed to few lengths and micro-batches have equally many.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._packing import FEW_LENGTHS, Packing, checked_lengths, padded_batch
from virtualbatch.keras._rows import unstretched
from virtualbatch.tensorflow._batch import Segment, as_tensor


def packed_segments(
    model: keras.Model, batch: Any, packing: Packing
) -> tuple[list[Segment], Callable[[Any], Any]]:
    """Cuts a batch by tokens.

    Args:
        model: the model.
        batch: (x, y, sample_weight) as Keras' loaders give them.
        packing: how rows are packed.

    Returns:
        The segments, longest rows first, and micro-batch -> its stretch (see `Rows`).
    """
    batch = tf.nest.map_structure(as_tensor, batch)
    found = padded_batch(model, batch)
    first = found.trimmed.index(True)
    rows, padded = tf.unstack(tf.shape(found.leaves[first])[:2])
    lengths = tf.cast(
        checked_lengths(packing.lengths(batch[0]), found.leaves[first].shape[0]), tf.int32
    )
    fits = tf.debugging.Assert(
        tf.reduce_all((lengths >= 1) & (lengths <= padded)) & tf.equal(tf.size(lengths), rows),
        [
            "No length may exceed the padded axis or be below 1, and there is one for each row. "
            "Got",
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
    with tf.control_dependencies([] if fits is None else [fits]):
        order = tf.argsort(lengths, direction="DESCENDING", stable=True)
    source = found.mapped(lambda leaf, trimmed: tf.gather(leaf, order))
    lengths = tf.gather(lengths, order)
    if model.jit_compile:
        step = tf.maximum(1, (padded + FEW_LENGTHS - 1) // FEW_LENGTHS)
        lengths = tf.minimum((lengths + step - 1) // step * step, padded)
        starts = tf.range(0, rows, tf.maximum(1, packing.tokens // padded))
    else:
        starts = _starts(lengths, packing.tokens)
    stops = tf.concat([starts[1:], [rows]], 0)

    def cut(source: Any, i: Any) -> Any:
        length = lengths[starts[i]]

        def piece(leaf: Any, trimmed: bool) -> Any:
            piece = leaf[starts[i] : stops[i]]
            if not trimmed:
                return piece
            piece = piece[:, :length]
            piece.set_shape([None, None, *leaf.shape[2:]])
            return piece

        return found.like(source).mapped(piece)

    def stretch(microbatch: Any) -> Any:
        length = tf.shape(found.like(microbatch).leaves[first])[1]
        return tf.cast(padded, tf.float64) / tf.cast(length, tf.float64)

    def one(i: int) -> Segment:
        return Segment(1, source, lambda source, _: cut(source, i), lambda _: stops[i] - starts[i])

    count = tf.size(starts)
    if tf.executing_eagerly():
        segments = [one(i) for i in range(int(count))]
    else:
        segments = [Segment(count, source, cut, lambda i: stops[i] - starts[i])]
    return segments, stretch if found.targets else unstretched


def _starts(lengths: Any, tokens: int) -> Any:
    """First row of each micro-batch, of rows that are sorted, longest first."""

    def body(start: Any, count: Any, starts: Any) -> Any:
        size = tf.maximum(1, tokens // lengths[start])
        return start + size, count + 1, starts.write(count, start)

    starts = tf.TensorArray(tf.int32, size=0, dynamic_size=True)
    *_, starts = tf.while_loop(lambda start, *_: start < tf.size(lengths), body, (0, 0, starts))
    return starts.stack()
