"""The floors of `fit` on JAX: a scan in one program, and programs that are called in a loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import lax

_TrainStep = Callable[[Any, Any], Any]


def in_a_scan(model: keras.Model, size: int) -> _TrainStep:
    """A `train_step` in which each micro-batch overwrites the gradients of the one before it."""

    def train_step(state: Any, data: Any) -> Any:
        trainable, non_trainable, optimizer, metrics = state

        def body(carry: Any, piece: Any) -> Any:
            total, _, *before = carry
            loss, *found = _differentiated(model, trainable, optimizer, before, piece)
            return (total + loss, *found), None

        zero = jnp.zeros((), keras.config.floatx())
        first = (zero, trainable, non_trainable, metrics)
        pieces = _cut(data, size)
        found, _ = lax.scan(body, first, pieces)
        return _updated(model, trainable, optimizer, found, len(jax.tree.leaves(pieces)[0]))

    return train_step


def called(model: keras.Model, size: int) -> _TrainStep:
    """The floor without a loop in the program, because convolutions in it are slow on CPU."""
    step = jax.jit(lambda *given: _differentiated(model, *given))
    update = jax.jit(
        lambda *given: _updated(model, *given), static_argnums=3, donate_argnums=(0, 1)
    )

    def train_step(state: Any, data: Any) -> Any:
        trainable, non_trainable, optimizer, metrics = state
        leaves, structure = jax.tree.flatten(_cut(data, size))
        total, before = 0.0, [non_trainable, metrics]
        for piece in zip(*map(list, leaves), strict=True):
            loss, gradients, *before = step(
                trainable, optimizer, before, jax.tree.unflatten(structure, piece)
            )
            total += loss
        return update(trainable, optimizer, (total, gradients, *before), len(leaves[0]))

    return train_step


def _cut(data: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), data)


def _differentiated(
    model: keras.Model, trainable: Any, optimizer: Any, before: Any, piece: Any
) -> tuple[Any, ...]:
    """(loss, gradients, non-trainable variables, metric variables) of one micro-batch."""
    (x, y), (non_trainable, metrics) = piece, before
    (_, (loss, y_pred, non_trainable, metrics)), gradients = jax.value_and_grad(
        model.compute_loss_and_updates, has_aux=True
    )(trainable, non_trainable, metrics, x, y, None, training=True, optimizer_variables=optimizer)
    with _metrics(model, metrics) as scope:
        for metric in model.metrics[1:]:
            metric.update_state(y, y_pred)
    return loss, gradients, non_trainable, _values(model, scope)


def _updated(
    model: keras.Model, trainable: Any, optimizer: Any, found: tuple[Any, ...], count: int
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """(logs, state) after the update with the results of `count` micro-batches."""
    total, gradients, non_trainable, metrics = found
    trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
    with _metrics(model, metrics) as scope:
        model.metrics[0].update_state(total / count)
        logs = model.get_metrics_result()
    return logs, (trainable, non_trainable, optimizer, _values(model, scope))


def _metrics(model: keras.Model, values: Any) -> keras.StatelessScope:
    return keras.StatelessScope(
        state_mapping=list(zip(model.metrics_variables, values, strict=True))
    )


def _values(model: keras.Model, scope: keras.StatelessScope) -> list[Any]:
    return [scope.get_current_value(variable) for variable in model.metrics_variables]


FLOORS = {
    "forward, backward in a scan, one update": (in_a_scan, True),
    "forward, backward called, one update": (called, False),
}
