"""Weights of a window before its first forward, and the shares that follow from them.

Eagerly the weights of all micro-batches come to the host in one copy and are checked there; in a
graph they stay tensors. Either way a share is formed in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from virtualbatch.tensorflow._batch import Segment
from virtualbatch.terms import SINGLE, check_same_terms, weight_terms
from virtualbatch.window import shares


class Shares(NamedTuple):
    """Shares of every micro-batch of a window.

    Fields:
        rows: part of the window's rows; a float64 vector, of NumPy eagerly.
        terms: term name -> the same for that term's weight; None when all terms weigh by rows.
            A term that does not depend on the rows has the shares of the rows, which sum to 1.
    """

    rows: Any
    terms: dict[Any, Any] | None

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
    rows = _eager_rows(segments) if tf.executing_eagerly() else _graph_rows(segments)
    if weight is None:
        return Shares(rows, None)
    named = _eager_weights if tf.executing_eagerly() else _graph_weights
    terms = named(segments, lambda microbatch: _checked(weight(microbatch)))
    return Shares(
        rows, {name: rows if found is None else found for name, found in terms.items()}
    )


def _checked(weight: Any) -> dict[Any, Any]:
    terms = weight_terms(weight)
    for name, value in terms.items():
        if value is None and name is not SINGLE:
            continue
        shape = getattr(value, "shape", ())
        if value is None or isinstance(value, str | bytes) or len(shape) != 0:
            got = f"shape {tuple(shape)}" if len(shape) else repr(value)
            raise ValueError(
                "A weight must be one number per micro-batch and term. "
                f"Got {got} for term {name!r}. "
                "Reduce it to what the loss was divided by, for example by a sum over the mask."
            )
    return terms


def _eager_rows(segments: Sequence[Segment]) -> Any:
    return np.asarray(shares([float(segment.rows(0)) for segment in segments]))


def _graph_rows(segments: Sequence[Segment]) -> Any:
    parts = []
    for count, _, rows in segments:
        if isinstance(count, int) and count == 1:
            parts.append(tf.cast(rows(0), tf.float64)[None])
        else:
            numbers = tf.range(count)
            parts.append(tf.cast(tf.zeros_like(numbers) + rows(numbers), tf.float64))
    return _divided(tf.concat(parts, 0))


def _divided(weights: Any) -> Any:
    return tf.math.divide_no_nan(weights, tf.reduce_sum(weights))


def _eager_weights(
    segments: Sequence[Segment], weight: Callable[[Any], dict[Any, Any]]
) -> dict[Any, Any]:
    found = [weight(segment.get(0)) for segment in segments]
    for terms in found:
        check_same_terms(terms, found[0])
    names = [name for name, value in found[0].items() if value is not None]
    result: dict[Any, Any] = dict.fromkeys(found[0])
    if names:
        table = [[tf.cast(terms[name], tf.float64) for name in names] for terms in found]
        on_host = tf.stack(table).numpy()
        for k, name in enumerate(names):
            result[name] = np.asarray(shares(on_host[:, k].tolist()))
    return result


def _graph_weights(
    segments: Sequence[Segment], weight: Callable[[Any], dict[Any, Any]]
) -> dict[Any, Any]:
    names: list[Any] = []
    marked: dict[Any, Any] = {}

    def vector(microbatch: Any) -> Any:
        terms = weight(microbatch)
        if marked:
            check_same_terms(terms, marked)
        marked.update((name, value is None) for name, value in terms.items())
        names[:] = [name for name, independent in marked.items() if not independent]
        return tf.stack([tf.cast(terms[name], tf.float64) for name in names] or [[]])

    parts = []
    for count, get, _ in segments:
        if isinstance(count, int) and count == 1:
            parts.append(vector(get(0))[None])
        else:
            parts.append(
                tf.map_fn(
                    lambda i, get=get: vector(get(i)),
                    tf.range(count),
                    fn_output_signature=tf.TensorSpec(None, tf.float64),
                    parallel_iterations=1,
                )
            )
    table = tf.concat(parts, 0)
    result: dict[Any, Any] = dict.fromkeys(marked)
    result.update((name, _divided(table[:, k])) for k, name in enumerate(names))
    return result
