"""A model on JAX as pure functions of its state: they assign nothing and return the new state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import keras

from virtualbatch.keras._added_losses import Shape, shapes_of_added


class State(NamedTuple):
    """Values of a model's variables, as Keras hands them to a `train_step` on JAX."""

    trainable: list[Any]
    non_trainable: list[Any]
    optimizer: list[Any]
    metrics: list[Any]


class StatelessModel:
    """A model with its state at the start of a window.

    Args:
        model: a model that is built and compiled.
        state: the state of the model.
    """

    def __init__(self, model: keras.Model, state: State):
        self._model = model
        self._state = state

    def forward(self, x: Any, trainable: list[Any], non_trainable: list[Any]) -> Any:
        """(predictions, changed non-trainable variables, added losses), in training mode."""
        model = self._model
        options = {"training": True} if model._call_has_training_arg else {}
        return model.stateless_call(trainable, non_trainable, x, return_losses=True, **options)

    def added_shapes(self, x: Any, few: int) -> list[Shape]:
        """Shapes of the losses that layers add for `few` rows, without running anything."""
        state = self._state

        def losses(x: Any) -> list[Any]:
            return self.forward(x, state.trainable, state.non_trainable)[2] or []

        rows = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((few, *leaf.shape[1:]), leaf.dtype), x
        )
        with losses_of(self._model, []):
            return shapes_of_added(self._model, lambda: jax.eval_shape(losses, rows))

    def scaled(self, loss: Any) -> Any:
        """The loss multiplied by the optimizer's loss scale."""
        optimizer = self._model.optimizer
        mapping = list(zip(optimizer.variables, self._state.optimizer, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return optimizer.scale_loss(loss)

    def scope(
        self, trainable: Sequence[Any], non_trainable: Sequence[Any], metrics: Sequence[Any] = ()
    ) -> Any:
        """A scope in which the model's variables have the given values."""
        model = self._model
        pairs = [
            *zip(model.trainable_variables, trainable, strict=True),
            *zip(model.non_trainable_variables, non_trainable, strict=True),
            *zip(model.metrics_variables if metrics else (), metrics, strict=True),
        ]
        return keras.StatelessScope(state_mapping=pairs)

    def changed(self, scope: Any) -> tuple[list[Any], list[Any]]:
        """Values of the non-trainable and the metric variables at the end of a scope."""
        model = self._model
        return (
            [scope.get_current_value(variable) for variable in model.non_trainable_variables],
            [scope.get_current_value(variable) for variable in model.metrics_variables],
        )


@contextmanager
def losses_of(model: keras.Model, losses: list[Any]) -> Iterator[None]:
    """Makes `model.losses` return the given losses inside the context.

    An empty list leaves the losses that the layers add themselves.
    """
    before, model._losses_override = model._losses_override, losses
    try:
        yield
    finally:
        model._losses_override = before
