"""Losses that are means over different things, with what each was divided by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

TOKENS = 3


class Problem(NamedTuple):
    """A loss to differentiate.

    Fields:
        loss_fn: batch -> loss.
        weight: micro-batch -> what that loss was divided by; None for rows.
        batch: rows -> batch.
        variables: what to differentiate with respect to.
        summands: numbers that meet in one entry of a gradient, per row.
    """

    loss_fn: Callable[[Any], Any]
    weight: Callable[[Any], Any] | None
    batch: Callable[[int], Any]
    variables: list[tf.Variable]
    summands: int


def problem(name: str, dtype: str = "float64") -> Problem:
    """One of the problems in `NAMES`, with fresh variables."""
    random = np.random.default_rng(7)
    shapes = {"kernel": (2, 4), "bias": (4,), "head": (4, 1), "scale": ()}
    weights = {
        key: tf.Variable(random.normal(size=shape), dtype=dtype, name=key)
        for key, shape in shapes.items()
    }

    def errors(x: Any, y: Any) -> Any:
        """Squared errors, one per token."""
        hidden = tf.tanh(tf.matmul(x, weights["kernel"]) + weights["bias"])
        return (tf.matmul(hidden, weights["head"])[..., 0] * weights["scale"] - y) ** 2

    def batch(rows: int) -> dict[str, Any]:
        random = np.random.default_rng(rows)
        data = {
            "x": random.normal(size=(rows, TOKENS, 2)),
            "y": random.normal(size=(rows, TOKENS)),
            # Some rows have no token at all, as padding at the end of an epoch.
            "mask": (random.uniform(size=(rows, TOKENS)) < 0.6)
            & (np.arange(rows) % 3 > 0)[:, None],
            "sample_weight": random.integers(0, 4, size=rows) * (np.arange(rows) != 0) + 0.25,
        }
        return {key: tf.constant(value, dtype) for key, value in data.items()}

    def rows_loss(batch: Any) -> Any:
        return tf.reduce_mean(errors(batch["x"], batch["y"]))

    def tokens_loss(batch: Any) -> Any:
        total = tf.reduce_sum(errors(batch["x"], batch["y"]) * batch["mask"])
        return total / tf.reduce_sum(batch["mask"])

    def weighted_loss(batch: Any) -> Any:
        per_row = tf.reduce_mean(errors(batch["x"], batch["y"]), 1)
        total = tf.reduce_sum(per_row * batch["sample_weight"])
        return total / tf.reduce_sum(batch["sample_weight"])

    def terms_loss(batch: Any) -> Any:
        return {"tokens": tokens_loss(batch), "weighted": weighted_loss(batch)}

    def penalty(batch: Any) -> Any:
        return 0.1 * tf.add_n([tf.reduce_sum(weight**2) for weight in weights.values()])

    def regularised_loss(batch: Any) -> Any:
        return {"tokens": tokens_loss(batch), "penalty": penalty(batch)}

    def rows_terms_loss(batch: Any) -> Any:
        return {"rows": rows_loss(batch), "penalty": penalty(batch)}

    def tokens(batch: Any) -> Any:
        return tf.reduce_sum(batch["mask"])

    def sample_weights(batch: Any) -> Any:
        return tf.reduce_sum(batch["sample_weight"])

    def both(batch: Any) -> Any:
        return {"weighted": sample_weights(batch), "tokens": tokens(batch)}

    def tokens_and_none(batch: Any) -> Any:
        return {"tokens": tokens(batch), "penalty": None}

    loss_fn, weight = {
        "rows": (rows_loss, None),
        "tokens": (tokens_loss, tokens),
        "sample weights": (weighted_loss, sample_weights),
        "terms": (terms_loss, both),
        "terms with None": (regularised_loss, tokens_and_none),
        "terms by rows": (rows_terms_loss, None),
    }[name]
    return Problem(loss_fn, weight, batch, list(weights.values()), TOKENS * 16)


NAMES = ["rows", "tokens", "sample weights", "terms", "terms with None", "terms by rows"]
