"""Keras' own train function around our step, and its errors in our words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._train_step import compiled


def plain_train_function(model: keras.Model) -> Any:
    """Keras' own train function, traced anew. The model keeps our train function.

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
    """Turns errors of checks inside the graph into our own errors.

    Args:
        trained: whether this fit has had a batch before.

    Raises:
        ValueError: a batch is refused, or there was no batch.
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
    """The text of one of our checks inside the graph; None for any other error."""
    ours = "microbatch_size and|All arrays of|No length may|Predictions that"
    assertion = re.search(rf"assertion failed: \[((?:{ours}).*)\]", str(error))
    # TensorFlow prints texts and numbers, each in brackets.
    return " ".join(re.split(r"\s*\] \[\s*", assertion[1])) if assertion else None
