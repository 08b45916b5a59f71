"""Finds which parts of a model are Keras' own, so that their type shows how they can be cut."""

from types import FunctionType
from typing import Any

import keras

# Layers of Keras that run a user's function.
_WRAPPERS = (
    keras.layers.Lambda,
    keras.layers.TorchModuleWrapper,
    keras.layers.JaxLayer,
    keras.layers.FlaxLayer,
    keras.layers.TFSMLayer,
)
# Attributes of a layer that may hold a function from the user.
_GIVEN = ("activation", "recurrent_activation", "activity_regularizer")
_COUPLED = (keras.losses.Circle, keras.losses.Dice, keras.losses.Tversky)
_COUPLED_FUNCTIONS = (keras.losses.circle, keras.losses.dice, keras.losses.tversky)


def is_keras_own(model: keras.Model) -> bool:
    """Whether Keras wrote everything that computes the loss of a model.

    Args:
        model: a compiled model.
    """
    return (
        type(model).compute_loss is keras.Model.compute_loss
        and all(_is_own(getattr(loss, "fn", loss)) for loss in losses_of(model))
        and all(_is_own_layer(layer) for layer in model._flatten_layers())
    )


def losses_that_couple_rows(model: keras.Model) -> list[str]:
    """Names of the model's losses that are Keras' own and read many rows at once."""
    return [
        getattr(loss, "name", None) or loss.__name__
        for loss in losses_of(model)
        if couples_rows(loss)
    ]


def couples_rows(loss: Any) -> bool:
    """Whether a loss is one of Keras' own that reads many rows at once."""
    called = getattr(loss, "fn", loss)
    return isinstance(loss, _COUPLED) or any(called is function for function in _COUPLED_FUNCTIONS)


def is_own_of_rows(loss: Any) -> bool:
    """Whether a loss is one of Keras' own that gives each row a value of its own.

    Keras' losses do, except those that read many rows at once, if they reduce the last axis. The
    caller must check that the last axis is not the rows.
    """
    given = getattr(loss, "_fn_kwargs", {})
    axes = {getattr(loss, "axis", -1), given.get("axis", -1)}
    return _is_own(getattr(loss, "fn", loss)) and not couples_rows(loss) and axes == {-1}


def losses_of(model: keras.Model) -> list[Any]:
    """The losses that a model was compiled with. Names are replaced by Keras' losses."""
    given = keras.tree.flatten(model.loss)
    return [
        keras.losses.get(loss) if isinstance(loss, str) else loss
        for loss in given
        if loss is not None
    ]


def _is_own_layer(layer: Any) -> bool:
    given = [vars(layer).get(name) for name in _GIVEN]
    return (
        _is_own(layer)
        and not isinstance(layer, _WRAPPERS)
        and all(found is None or _is_own(found) for found in given)
        # A functional model may also contain operations that couple rows, such as a mean.
        and all(isinstance(op, keras.Layer) for op in vars(layer).get("_operations", []))
    )


def _is_own(found: Any) -> bool:
    source = found if isinstance(found, FunctionType | type) else type(found)
    return source.__module__.partition(".")[0] == "keras"
