"""The floor of `fit` on TensorFlow: a loop in the graph."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import tree


def in_a_loop(model: keras.Model, size: int) -> Callable[[Any], dict[str, Any]]:
    """A `train_step` in which each micro-batch overwrites the gradients of the one before it."""

    def differentiated(x: Any, y: Any) -> tuple[Any, list[Any]]:
        variables = model.trainable_variables
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            loss = model.compute_loss(x, y, y_pred)
        for metric in model.metrics[1:]:
            metric.update_state(y, y_pred)
        # Gradients of an embedding are slices, which do not know their shape.
        return loss, [
            tf.ensure_shape(tf.convert_to_tensor(gradient), variable.shape)
            for gradient, variable in zip(tape.gradient(loss, variables), variables, strict=True)
        ]

    def train_step(data: Any) -> dict[str, Any]:
        variables = model.trainable_variables
        stacks = tree.map_structure(lambda x: tf.reshape(x, (-1, size, *x.shape[1:])), data)
        count = tf.shape(tree.flatten(stacks)[0])[0]

        def body(i: Any, total: Any, *latest: Any) -> Any:
            loss, gradients = differentiated(*tree.map_structure(lambda stack: stack[i], stacks))
            return i + 1, total + loss, *gradients

        zero = tf.zeros((), keras.config.floatx())
        first = (tf.constant(0), zero, *(tf.identity(v.value) for v in variables))
        _, total, *gradients = tf.while_loop(
            lambda i, *_: i < count, body, first, parallel_iterations=1
        )
        model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        model.metrics[0].update_state(total / tf.cast(count, total.dtype))
        return model.get_metrics_result()

    return train_step


# On CPU a convolution is slow in a loop inside an XLA program, so `jit_compile` is False.
FLOORS = {"forward, backward in a loop, one update": (in_a_loop, False)}
