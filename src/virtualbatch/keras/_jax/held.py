"""The values of a model's variables, which `fit` takes out of them while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from virtualbatch.keras._jax.stateless import State


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


def put_back(model: keras.Model, state: State) -> None:
    """Puts a state back into the variables of a model, if it is still there.

    Args:
        model: the model.
        state: what `fit` took out of them.
    """
    pairs = _pairs(model, state)
    # A program that ran has taken its inputs.
    if not any(value.is_deleted() for _, value in pairs):
        for variable, value in pairs:
            variable.assign(value)
        # What `fit` assigns once more when it ends.
        model._jax_state = {
            "trainable_variables": state.trainable,
            "non_trainable_variables": state.non_trainable,
            "optimizer_variables": state.optimizer,
            "metrics_variables": state.metrics,
        }
