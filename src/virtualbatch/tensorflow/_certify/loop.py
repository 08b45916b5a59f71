"""Certifying a hand-written TensorFlow training loop, whose state is held in variables."""

from collections.abc import Callable, Iterable
from typing import Any

from virtualbatch.certify import loop as loops
from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.loop_state import VariableState


def certify_loop(
    loop: Callable[[list[Any], int], Any],
    batches: Iterable[Any],
    *,
    microbatch_size: int,
    **state: Any,
) -> Certificate:
    """Proves that your training loop makes the updates of the whole batch, or names its mistake.

    The loop runs on micro-batches and, with `accumulation_steps=1`, on the same rows as whole
    batches. Both runs must leave the same state. See `virtualbatch.certify_loop`. Set seeds inside
    the loop if it draws random numbers.

    Args:
        loop: a function of a list of micro-batches and `accumulation_steps`. It trains in place,
            and its result is ignored. It may call a `tf.function`.
        batches: two whole batches or more, in a list, a loader or another iterable. The first two
            are used.
        microbatch_size: the rows of one micro-batch: fewer than a batch has.
        **state: what the loop trains, under names of your choice: models, built optimizers,
            buffers, averages of weights. Each is an object with `variables`, a variable, or a list
            of these.

    Returns:
        The certificate. All of the state is as before the call.

    Raises:
        ValueError: there is nothing to compare, the loop is not deterministic, or the state is not
            finite.
        ValueError: the first update creates a variable. Build the optimizer before the call.
        TypeError: a part of the state has no variables.

    Example:
        >>> import tensorflow as tf
        >>> w = tf.Variable(tf.ones([2, 1]))
        >>> def loop(microbatches, accumulation_steps):
        ...     total = tf.zeros_like(w)
        ...     for i, x in enumerate(microbatches, start=1):
        ...         with tf.GradientTape() as tape:
        ...             loss = tf.reduce_sum((x @ w) ** 2) / len(x)
        ...         total += tape.gradient(loss, w)
        ...         if i % accumulation_steps == 0:
        ...             w.assign_sub(0.1 * total)
        ...             total = tf.zeros_like(w)
        >>> batches = [tf.ones([8, 2]), tf.ones([8, 2])]
        >>> found = certify_loop(loop, batches, microbatch_size=4, w=w)
        >>> found.findings[0].kind
        'sum_loss'
    """
    held = VariableState(state, lambda variable: variable.numpy())
    return loops.certify_loop(
        loop, batches, microbatch_size=microbatch_size, save=held.save, load=held.load
    )
