"""Certifying a training loop of one's own in TensorFlow: its state is held in variables."""

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
    """Proves that a loop of your own makes the updates of the whole batch, or names its mistake.

    See `virtualbatch.certify_loop`. Set seeds inside the loop if it draws random numbers.

    Args:
        loop: (list of micro-batches, accumulation_steps) -> anything. It trains in place, and may
            call a `tf.function`.
        batches: two whole batches or more, in a list, a loader or any iterable.
        microbatch_size: rows of one micro-batch; fewer than a batch has.
        **state: what the loop trains, by names of your own: models, optimizers (built), buffers,
            averages of weights; anything with `variables`, variables, and lists of them.

    Returns:
        The certificate. All of the state is as before.

    Raises:
        ValueError: see `virtualbatch.certify_loop`; or a variable is made by the first update.
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
