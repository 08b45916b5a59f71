"""The values of a model's variables, which `fit` takes out of them while it trains."""

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
    """While the variables of a model hold a state.

    Args:
        model: the model.
        state: what `fit` took out of them.
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
    """Whether a program has taken what it was given, so that a state has no values any more."""
    return any(value.is_deleted() for value in jax.tree.leaves(state))


def refuse_lost(state: State, wait: bool) -> None:
    """Refuses a state that the last window should have given, but ran out of memory.

    JAX raises such errors late, when any of the values is read.

    Args:
        state: what the window is given.
        wait: whether to wait for the last window; otherwise only an ended window is checked.

    Raises:
        MemoryError: that window ran out of memory.
    """
    # What one program gives succeeds or fails together.
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
        state: what the window was given or should have given.
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
    """Puts a state back into the variables of a model, if it is still there.

    Args:
        model: the model.
        state: what `fit` took out of them.
    """
    if not is_gone(state):
        for variable, value in _pairs(model, state):
            variable.assign(value)
        # What `fit` assigns once more when it ends.
        model._jax_state = {
            "trainable_variables": state.trainable,
            "non_trainable_variables": state.non_trainable,
            "optimizer_variables": state.optimizer,
            "metrics_variables": state.metrics,
        }
