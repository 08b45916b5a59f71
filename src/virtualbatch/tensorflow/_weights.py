"""Weights of a window, computed before its first forward pass, and the shares made of them.

Eagerly, the weights of all micro-batches are copied to the host at once and checked there. In a
graph they stay tensors. In both cases shares are float64.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from virtualbatch.tensorflow._gradients import add
from virtualbatch.tensorflow._loop import Output, fold, trace
from virtualbatch.tensorflow._replicas import replicas, summed
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.window.shares import Shares
from virtualbatch.window.terms import GivenWeight, WeightFunction
from virtualbatch.window.weights import host_shares


def window_shares(segments: Sequence[Segment], weight: GivenWeight) -> Shares:
    """Shares of a window by rows and, if a weight function is given, by its weights.

    If several replicas train in step, they share one window, and totals include all replicas.

    Args:
        segments: the segments of this replica.
        weight: as for `host_shares`.

    Returns:
        The shares. In a graph they are float64 tensors whose values are not checked. A weight of 0
        has the share 0. Any other weight is divided by the total, even if the result is NaN.

    Raises:
        ValueError: a weight is not valid, as in `host_shares`.
    """
    if tf.executing_eagerly():
        rows = [segment.rows(0) for segment in segments]
        found = host_shares(rows, weight, (segment.get(0) for segment in segments), _on_host)
        # TensorFlow reads a Python float as float32.
        return found.mapped(np.asarray)
    rows = _graph_rows(segments)
    checked = WeightFunction(weight) if callable(weight) else None
    columns = [rows, *(_weighed(segments, checked) if checked else ())]
    totals = [tf.reduce_sum(column) for column in columns]
    if replicas() > 1:
        totals = summed(totals)
    of_rows, *of_terms = map(_divided, columns, totals)
    window = totals[0] if segments[0].rows(0) is not None else None
    ones = tf.ones_like(of_rows)
    if checked is None:
        return Shares(of_rows, None, frozenset(), window, of_rows if weight is None else ones)
    terms = checked.by_name(of_terms, of_rows, ones)
    if window is None and len(terms) == len(of_terms) == 1:
        window = totals[1]
    return Shares(of_rows, terms, checked.certain, window, of_rows)


def _divided(column: Any, total: Any) -> Any:
    # A weight of 0 has the share 0, even if the total is 0.
    return column / tf.where(tf.equal(column, 0), tf.ones_like(column), total)


def _weighed(segments: Sequence[Segment], weight: WeightFunction) -> list[Any]:
    """The weights of micro-batches in a graph: one vector for each term that has a weight."""

    def weights(index: Any, microbatch: Any) -> Any:
        values = [_wide(value) for value in weight.values(microbatch)]
        return tf.stack(values or tf.zeros([0], tf.float64))[None]

    # Not tf.map_fn: an error of the user's function in it breaks later variable scopes.
    (table,) = fold(trace(segments, weights), lambda _, found: Output([], [found]), add).rows
    return [table[:, k] for k in range(table.shape[1])]


def _graph_rows(segments: Sequence[Segment]) -> Any:
    parts = []
    for segment in segments:
        if isinstance(segment.count, int) and segment.count == 1:
            rows = segment.rows(0)
            if rows is None:
                # If rows are not known, micro-batches weigh alike. One that does not run weighs 0.
                rows = 1 if segment.entries is None else tf.minimum(segment.entries, 1)
            parts.append(tf.cast(rows, tf.float64)[None])
        else:
            numbers = tf.range(segment.count)
            rows = tf.zeros_like(numbers) + _or_one(segment.rows(numbers))
            parts.append(tf.cast(rows, tf.float64))
    return tf.concat(parts, 0)


def _or_one(rows: Any) -> Any:
    # If rows are not known, all micro-batches weigh alike.
    return 1 if rows is None else rows


def _wide(weight: Any) -> Any:
    """A weight as a float64 scalar."""
    number = weight if tf.is_tensor(weight) else np.asarray(weight, np.float64)
    return tf.ensure_shape(tf.cast(number, tf.float64), [])


def _on_host(weights: list[Any]) -> Any:
    return tf.stack([_wide(weight) for weight in weights]).numpy()
