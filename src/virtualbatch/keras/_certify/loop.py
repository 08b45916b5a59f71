"""Certifying a training loop of one's own with Keras: its state is held in variables."""

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
    """Proves that a loop of your own makes the updates of the whole batch, or names its mistake.

    See `virtualbatch.certify_loop`. It is for loops that train Keras models by hand, on any
    backend; for `fit` see `certify`.

    Args:
        loop: (list of micro-batches, accumulation_steps) -> anything. It trains in place, for
            example by `model.train_on_batch`. Set seeds inside it if it draws random numbers.
        batches: two whole batches or more, in a list, a loader or any iterable.
        microbatch_size: rows of one micro-batch; fewer than a batch has.
        **state: what the loop trains, by names of your own: models, optimizers (built), averages
            of weights; anything with `variables`, variables, and lists of them.

    Returns:
        The certificate. All of the state is as before.

    Raises:
        ValueError: see `virtualbatch.certify_loop`; or a variable is made by the first update.
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
