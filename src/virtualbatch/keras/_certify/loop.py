"""Certifies a user's training loop with Keras, whose state is held in variables."""

from collections.abc import Callable, Iterable
from typing import Any

import keras

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
    batches. Both runs must leave the same state. See `virtualbatch.certify_loop`.

    It is for loops that train a Keras model by hand, on any backend. For `fit` use `certify`. Set
    seeds inside the loop if it draws random numbers.

    Args:
        loop: a function of a list of micro-batches and `accumulation_steps`. It trains in place,
            and its result is ignored. It may call `model.train_on_batch`.
        batches: two whole batches or more, in a list, a loader or another iterable. The first two
            are used.
        microbatch_size: the rows of one micro-batch: fewer than a batch has.
        **state: what the loop trains, under names of your choice: models, built optimizers,
            averages of weights. Each is an object with `variables`, a variable, or a list of
            these.

    Returns:
        The certificate. All of the state is as before the call.

    Raises:
        ValueError: there is nothing to compare, the loop is not deterministic, or the state is not
            finite.
        ValueError: the first update creates a variable. Build the optimizer before the call.
        TypeError: a part of the state has no variables.

    Example:
        >>> keras.utils.set_random_seed(0)
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile("adam", loss="mse")
        >>> model.optimizer.build(model.trainable_variables)
        >>> def loop(microbatches, accumulation_steps):
        ...     for x, y in microbatches:
        ...         model.train_on_batch(x, y)
        >>> x = keras.ops.convert_to_numpy(keras.random.normal((2, 6, 3), seed=0))
        >>> state = {"weights": model.weights, "optimizer": model.optimizer}
        >>> batches = [(rows, rows[:, :1]) for rows in x]
        >>> found = certify_loop(loop, batches, microbatch_size=3, **state)
        >>> found.findings[0].kind, found.findings[0].where
        ('per_microbatch', 'optimizer.adam/iteration')
    """
    held = VariableState(state, keras.ops.convert_to_numpy)
    return loops.certify_loop(
        loop, batches, microbatch_size=microbatch_size, save=held.save, load=held.load
    )
