"""The values of a model's variables, which `fit` takes out of the variables while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import keras

from virtualbatch.keras._jax.plan import MEMORY
from virtualbatch.keras._jax.stateless import State
from virtualbatch.plan.out_of_memory import bytes_asked
from virtualbatch.plan.plan import readable_bytes


def _pairs(model: keras.Model, state: State) -> list[tuple[Any, Any]]:
    """Each variable of a model with its value in a state."""
    return [
        *zip(model.trainable_variables, state.trainable, strict=True),
        *zip(model.non_trainable_variables, state.non_trainable, strict=True),
        *zip(model.optimizer.variables, state.optimizer, strict=True),
        *zip(model.metrics_variables, state.metrics, strict=True),
    ]


@contextmanager
def holding(model: keras.Model, state: State) -> Iterator[None]:
    """Makes the variables of a model hold a state inside the context.

    Args:
        model: the model.
        state: the values that `fit` took out of the variables.
    """
    pairs = _pairs(model, state)
    before = [variable._value for variable, _ in pairs]
    try:
        for variable, value in pairs:
            variable._value = value
        yield
    finally:
        for (variable, _), value in zip(pairs, before, strict=True):
            variable._value = value


def is_gone(state: State) -> bool:
    """Whether a program has overwritten a state that it was given, so its values are lost."""
    return any(value.is_deleted() for value in jax.tree.leaves(state))


def refuse_lost(state: State, wait: bool) -> None:
    """Refuses a state that does not exist because the last window ran out of memory.

    JAX raises such errors late, when one of the values is read.

    Args:
        state: the state for the next window.
        wait: whether to wait for the last window. Otherwise it is checked only if it has ended.

    Raises:
        MemoryError: the last window ran out of memory.
    """
    # All results of one program succeed or fail together, so one value is enough.
    latest = jax.tree.leaves(state)[0]
    try:
        if wait or latest.is_ready():
            latest.block_until_ready()
    except MEMORY.errors.kinds as error:
        if not MEMORY.errors.is_possible(error):
            raise
        raise weights_are_gone(error, state) from error


def weights_are_gone(error: BaseException, state: State) -> MemoryError:
    """The error for a later window that ran out of memory with the only copy of the weights.

    Args:
        error: what JAX raised.
        state: the state that the window got, or should have returned.
    """
    asked = bytes_asked(str(error))
    got = "memory ran out" if asked is None else f"{readable_bytes(asked)} more were asked for"
    size = readable_bytes(sum(value.nbytes for value in jax.tree.leaves(state)))
    return MemoryError(
        "A window whose shape fitted once must fit again, because JAX overwrites the weights that "
        f"it is given. Got a later one for which {got}, so {size} of weights, optimizer state and "
        "metrics are gone. Load the last checkpoint, and leave more memory free: pass a smaller "
        "microbatch_size, or keep less else on the device."
    )


def put_back(model: keras.Model, state: State) -> None:
    """Puts a state back into the variables of a model, unless its values are lost.

    Args:
        model: the model.
        state: the values that `fit` took out of the variables.
    """
    if not is_gone(state):
        for variable, value in _pairs(model, state):
            variable.assign(value)
        # `fit` assigns these values once more when it ends.
        model._jax_state = {
            "trainable_variables": state.trainable,
            "non_trainable_variables": state.non_trainable,
            "optimizer_variables": state.optimizer,
            "metrics_variables": state.metrics,
        }
