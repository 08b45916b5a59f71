"""The verb: a function of rows on the memory of a micro-batch."""

from collections.abc import Callable
from typing import Any

from virtualbatch.plan.auto import Auto, check_sizes_or_auto
from virtualbatch.tensorflow._rowwise.function import Rowwise
from virtualbatch.window.options import check_flags


def rowwise(
    fn: Callable[..., Any],
    *,
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    check: bool = True,
) -> Rowwise:
    """The same function on the memory of a micro-batch, for losses that couple rows.

    Wrap what comes before rows meet, and let the loss see all rows: contrastive and ranking losses,
    Dice, correlations and their like are then exact. The function runs in micro-batches, of which
    only the outputs are kept; when a tape asks for its gradient, it runs again. So it costs one
    more forward. Tape, loss, clipping, scaling and optimizer stay as they are, eagerly, inside
    `tf.function` and with XLA.

    Random numbers are drawn again as they were, and what the function writes to variables stands
    as after one run of each micro-batch, in order: a BatchNorm normalises by micro-batches, and
    updates its moving statistics once for each. Where no tape records eagerly, and where a
    micro-batch holds all rows, this is the function itself. Inside `strategy.run` it is given the
    rows of one replica; `all_gather` of its outputs shows each loss the rows of all.

    Args:
        fn: (batch, *shared) -> outputs: a nested structure of dense tensors with one entry per row
            and of None. What is no tensor goes to every micro-batch as it is. `tf.function` must be
            able to trace it; that is done once for each structure of a batch.
        microbatch_size: rows of one forward and backward; or "auto" or an `Auto`, which plan it at
            the first batch.
        accumulation_steps: micro-batches per batch: `microbatch_size = ceil(rows / steps)`.
        check: whether eagerly the first call proves, on a few rows, that each row stands alone. In
            a graph run `certify` once.

    Returns:
        A function of the batch, or of a `Window` without a size, and of the shared arguments, which
        every micro-batch gets whole. Its gradients reach variables, shared arguments and the
        batch. A derivative of these gradients is right, too, but not on less memory.

    Raises:
        ValueError: sizes are not positive integers or disagree. The function that is returned
            raises it where an output has not one entry per row, where outputs of micro-batches
            differ in structure, where random numbers cannot be drawn again, where `fn` uses a
            tensor from outside that takes a gradient, where a forward-mode derivative is asked
            for, and where the first rows show that a row does not stand alone.
        MemoryError: memory ran out in the second run, where smaller micro-batches would have given
            other outputs; or one row does not fit.
        TypeError: `fn` is no function, or returns what is no dense tensor.

    Example:
        >>> import tensorflow as tf
        >>> kernel = tf.Variable([[1.0], [2.0]])
        >>> encode = rowwise(lambda batch: tf.tanh(batch @ kernel), microbatch_size=2)
        >>> with tf.GradientTape() as tape:
        ...     scores = encode(tf.constant([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        ...     loss = tf.math.reduce_std(scores)
        >>> print(tape.gradient(loss, kernel).numpy().round(3))
        [[-0.194]
         [ 0.016]]
    """
    check_flags(check=check)
    if not callable(fn):
        raise TypeError(
            f"fn must be a function of a batch. Got fn={fn!r}. Pass fn=lambda batch: ..."
        )
    # A Window needs none.
    if microbatch_size is not None or accumulation_steps is not None:
        check_sizes_or_auto(microbatch_size, accumulation_steps)
    return Rowwise(fn, microbatch_size, accumulation_steps, check)
