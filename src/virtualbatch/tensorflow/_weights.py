"""Weights of a window before its first forward, and the shares that follow from them.

Eagerly the weights of all micro-batches come to the host in one copy and are checked there; in a
graph they stay tensors. Either way a share is formed in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from virtualbatch.tensorflow._batch import Segment
from virtualbatch.tensorflow._gradients import add
from virtualbatch.tensorflow._loop import Output, fold, trace
from virtualbatch.window.shares import shares
from virtualbatch.window.terms import check_same_terms, check_steady_weights, weight_terms
from virtualbatch.window.tree import rank


class Shares(NamedTuple):
    """Shares of every micro-batch of a window.

    Fields:
        rows: part of the window's rows; a float64 vector, of NumPy eagerly.
        terms: term name -> the same for that term's weight; None when all terms weigh by rows.
            A term that does not depend on the rows has the shares of the rows, which sum to 1.
        window: rows of the window; a number eagerly, else a scalar.
    """

    rows: Any
    terms: dict[Any, Any] | None
    window: Any

    def of_rows_or_term(self) -> Any:
        """The shares of each micro-batch as one: of its only term, or of its rows."""
        if self.terms is None or len(self.terms) != 1:
            return self.rows
        return next(iter(self.terms.values()))

    def of(self, names: Sequence[Any], index: Any) -> list[Any]:
        """Shares of the named terms for one micro-batch.

        Raises:
            ValueError: the names are not those of the weights.
        """
        if self.terms is None:
            return [self.rows[index]] * len(names)
        check_same_terms(dict.fromkeys(names), self.terms)
        return [self.terms[name][index] for name in names]


def window_shares(segments: Sequence[Segment], weight: Callable[[Any], Any] | None) -> Shares:
    """Shares of a window by rows and, if a weight function is given, by its weights.

    Args:
        segments: the window's segments.
        weight: micro-batch -> what the loss was divided by: a scalar >= 0, or a dict of them by
            term name, None marking a term that does not depend on the rows.

    Returns:
        The shares.

    Raises:
        ValueError: a weight is negative, not finite, not a scalar, or names differ between
            micro-batches.
    """
    if tf.executing_eagerly():
        counts = [float(segment.rows(0)) for segment in segments]
        rows, window = np.asarray(shares(counts)), int(sum(counts))
    else:
        found = _graph_rows(segments)
        rows, window = _divided(found), tf.reduce_sum(found)
    if weight is None:
        return Shares(rows, None, window)
    named = _eager_weights if tf.executing_eagerly() else _graph_weights
    terms = named(segments, lambda microbatch: _checked(weight(microbatch)))
    named_shares = {name: rows if found is None else found for name, found in terms.items()}
    return Shares(rows, named_shares, window)


def _checked(weight: Any) -> dict[Any, Any]:
    terms = weight_terms(weight)
    for name, value in terms.items():
        if value is None and isinstance(weight, Mapping):
            continue
        axes = rank(value) if hasattr(value, "shape") else np.ndim(value)
        if value is None or isinstance(value, str | bytes) or axes not in (0, None):
            got = f"shape {tuple(np.shape(value))}" if axes else repr(value)
            raise ValueError(
                "A weight must be one number per micro-batch and term. "
                f"Got {got} for term {name!r}. "
                "Reduce it to what the loss was divided by, for example by a sum over the mask."
            )
    return terms


def _graph_rows(segments: Sequence[Segment]) -> Any:
    parts = []
    for segment in segments:
        if isinstance(segment.count, int) and segment.count == 1:
            parts.append(tf.cast(segment.rows(0), tf.float64)[None])
        else:
            numbers = tf.range(segment.count)
            parts.append(tf.cast(tf.zeros_like(numbers) + segment.rows(numbers), tf.float64))
    return tf.concat(parts, 0)


def _wide(weight: Any) -> Any:
    """A weight as a float64 scalar; TensorFlow itself reads a Python float as float32."""
    number = weight if tf.is_tensor(weight) else np.asarray(weight, np.float64)
    return tf.ensure_shape(tf.cast(number, tf.float64), [])


def _divided(weights: Any) -> Any:
    return tf.math.divide_no_nan(weights, tf.reduce_sum(weights))


def _eager_weights(
    segments: Sequence[Segment], weight: Callable[[Any], dict[Any, Any]]
) -> dict[Any, Any]:
    found = [weight(segment.get(0)) for segment in segments]
    for terms in found:
        check_steady_weights(terms, found[0])
    names = [name for name, value in found[0].items() if value is not None]
    result: dict[Any, Any] = dict.fromkeys(found[0])
    if names:
        table = [[_wide(terms[name]) for name in names] for terms in found]
        on_host = tf.stack(table).numpy()
        for k, name in enumerate(names):
            result[name] = np.asarray(shares(on_host[:, k].tolist()))
    return result


def _graph_weights(
    segments: Sequence[Segment], weight: Callable[[Any], dict[Any, Any]]
) -> dict[Any, Any]:
    first: dict[Any, Any] = {}
    names: list[Any] = []

    def row(index: Any, microbatch: Any) -> Any:
        terms = weight(microbatch)
        if not first:
            first.update(terms)
            names.extend(name for name, value in terms.items() if value is not None)
        check_steady_weights(terms, first)
        return tf.stack([_wide(terms[name]) for name in names] or tf.zeros([0], tf.float64))[None]

    # Not tf.map_fn: an error of the user's function in it breaks later variable scopes.
    (table,) = fold(trace(segments, row), lambda _, found: Output([], [found]), add).rows
    result: dict[Any, Any] = dict.fromkeys(first)
    result.update((name, _divided(table[:, k])) for k, name in enumerate(names))
    return result
