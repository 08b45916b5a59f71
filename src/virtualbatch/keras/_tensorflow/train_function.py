"""Keras' own train function around our step, and what it raises, in our words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._train_step import compiled


def plain_train_function(model: keras.Model) -> Any:
    """Keras' own train function, traced anew; the model keeps ours.

    Its logs hold the losses of micro-batches.
    """
    ours, step = model.train_function, model.train_step
    model.train_step = step.with_losses
    try:
        with compiled(model, False):
            type(model).make_train_function(model, force=True)
    finally:
        model.train_step = step
    plain, model.train_function = model.train_function, ours
    return plain


@contextmanager
def in_our_words(trained: bool) -> Iterator[None]:
    """Raises checks that could only run inside the graph as what they are.

    Args:
        trained: whether this fit has had a batch before.

    Raises:
        ValueError: a batch is refused, or there was none.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        text = _refusal(error)
        if text is None:
            raise
        raise ValueError(text) from error
    except (tf.errors.OutOfRangeError, StopIteration) as error:
        if trained:
            raise
        raise ValueError(
            "fit needs at least one batch. Got no data. "
            "A generator can be read only once: pass a fresh one."
        ) from error


def _refusal(error: tf.errors.InvalidArgumentError) -> str | None:
    """Text of a check that could only run inside the graph, or None if it was none of ours."""
    ours = "microbatch_size and|All arrays of|No length may|Predictions that"
    assertion = re.search(rf"assertion failed: \[((?:{ours}).*)\]", str(error))
    # What was printed is pieces of text and numbers, each in brackets.
    return " ".join(re.split(r"\s*\] \[\s*", assertion[1])) if assertion else None
