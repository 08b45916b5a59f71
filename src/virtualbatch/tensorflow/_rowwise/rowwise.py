"""The public verb `rowwise`: a function of rows, run with the memory of a micro-batch."""

from collections.abc import Callable
from typing import Literal

from virtualbatch.plan.auto import Auto, check_sizes_or_auto
from virtualbatch.tensorflow._rowwise.function import Outputs, Rowwise
from virtualbatch.window.options import check_flags


def rowwise(
    fn: Callable[..., Outputs],
    *,
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    accumulation_steps: int | None = None,
    check: bool = True,
) -> Rowwise[Outputs]:
    """A function like fn, with the memory of a micro-batch, for losses that need all rows at once.

    Wrap the part of the model that treats each row alone, such as the encoders of a contrastive
    loss. The loss stays outside and runs once, on the outputs of all rows. So contrastive and
    ranking losses, Dice, correlations and similar losses are exact. Tape, clipping, scaling and
    optimizer lines stay as they are, eagerly, inside `tf.function` and with XLA.

    The forward pass runs fn in micro-batches and keeps only the outputs. When a tape asks for the
    gradient, fn runs again with the same random numbers. So the price is one more forward.
    Variables that fn writes hold what they hold after one run of each micro-batch, in order: a
    BatchNorm normalises by micro-batches and updates its moving statistics once for each.

    fn runs unchanged where no tape records eagerly, and where one micro-batch holds all rows.
    Inside `strategy.run` the batch is the rows of one replica, and `all_gather` of the outputs
    gives each loss the rows of all replicas.

    Args:
        fn: a function of `(batch, *shared)`. It returns a nested structure of dense tensors with
            one entry per row, or of None. `tf.function` must be able to trace it, which happens
            once per structure of a batch. Each micro-batch gets a shared argument whole.
        microbatch_size: the rows of one forward and backward. `"auto"` or an `Auto` plans the size
            at the first batch. Leave it out if the batch is a `Window`.
        accumulation_steps: the micro-batches per batch, instead of a size:
            `microbatch_size = ceil(rows / accumulation_steps)`.
        check: whether the first eager call checks, on a few rows, that fn computes each row from
            that row alone. In a graph nothing is checked, so run `certify` once.

    Returns:
        A function of `(batch, *shared)`. Its gradients reach variables, shared arguments and the
        batch. A derivative of these gradients is right too, but needs the memory of all rows.

    Raises:
        ValueError: a size is not a positive integer, or two sizes disagree.
        ValueError: when called: an output has not one entry per row, depends on other rows, or
            changes its structure between micro-batches.
        ValueError: when called: fn draws random numbers that cannot be drawn again, or uses a
            tensor from outside that takes a gradient.
        ValueError: when called: a forward-mode derivative is asked for.
        MemoryError: not even one row fits; or the second run ran out of memory, and smaller
            micro-batches would have given other outputs.
        TypeError: fn is not a function, or returns something that is not a dense tensor.

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
    # A Window needs no size.
    if microbatch_size is not None or accumulation_steps is not None:
        check_sizes_or_auto(microbatch_size, accumulation_steps)
    return Rowwise(fn, microbatch_size, accumulation_steps, check)
