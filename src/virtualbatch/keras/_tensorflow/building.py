"""Creates what a window needs before its graph: variables of layers and of the optimizer."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._certify.certificate import build_symbolically
from virtualbatch.tensorflow._arrays import specs


def build(model: keras.Model, batch: Any) -> None:
    """Builds a model. With `run_eagerly`, `call` may read values, so it is built on values."""
    if not model.run_eagerly:
        build_symbolically(model, batch)
        return
    build_layers(model, tf.nest.map_structure(tf.convert_to_tensor, batch[0]))
    build_optimizer(model)


def build_layers(model: keras.Model, x: Any) -> None:
    """Creates the variables of layers that have seen no data, and changes no existing variable.

    They must exist early, because the window reads BatchNorm statistics before its first forward.

    Args:
        model: the model.
        x: inputs of a micro-batch.
    """

    def forward(x: Any) -> Any:
        return model(x, training=False) if model._call_has_training_arg else model(x)

    if all(layer.built for layer in model._flatten_layers()):
        return
    if tf.executing_eagerly():
        forward(x)
    else:
        with tf.init_scope():
            tf.function(forward, autograph=False).get_concrete_function(specs(x))


def build_optimizer(model: keras.Model) -> None:
    """Creates the optimizer's variables: without them it scales losses by its initial scale."""
    optimizer = model.optimizer
    if not optimizer.built and model.trainable_variables:
        # Keras builds an optimizer in this scope at its first update, and it names the variables.
        with tf.init_scope(), keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(model.trainable_variables)


def created_outside(next_creator: Callable[..., Any], **arguments: Any) -> Any:
    """Creates a variable outside the graph that is being traced.

    A variable inside the graph makes TensorFlow trace the whole step once or twice more.
    """
    with tf.init_scope():
        return next_creator(**arguments | {"experimental_enable_variable_lifting": False})
