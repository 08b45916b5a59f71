"""Keras on TensorFlow: a `train_step` that runs one batch as a window.

The batch is checked and cut, what is not built is built outside the graph, and the window runs. The
train function around it keeps XLA inside the loop over micro-batches.
"""

import re
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._tensorflow_window import WindowRun, rows_of
from virtualbatch.keras._train_step import TrainStep, uncompiled
from virtualbatch.split import sizes_disagree
from virtualbatch.tensorflow._batch import is_array, segments, specs


class TensorFlowStep(TrainStep):
    """The `train_step` of a model that accumulates on TensorFlow."""

    _layers_built = False

    def __call__(self, data: Any) -> dict[str, Any]:
        """Trains on one batch, as Keras' `train_step` does."""
        model = self._model
        batch = self._unpacked(data)
        with tf.variable_creator_scope(_created_outside):
            batch = self._with_agreeing_sizes(batch)
            cut = segments(
                batch,
                self._microbatch_size,
                None if self._microbatch_size else self._accumulation_steps,
            )
            if not self._layers_built:
                _build_layers(model, cut[0].get(0)[0])
                self._layers_built = True
            _build_optimizer(model)
            window = WindowRun(model, cut, rows_of(batch))
            results = window.train()
            self._say(window.losses_of_one_number)
        return results

    def _with_agreeing_sizes(self, batch: Any) -> Any:
        """The batch, readable only if both sizes agree for it.

        The last batch of an epoch may be short. Which one that is only the data knows, but the
        first of an epoch, where the loss tracker has counted nothing yet, is not.
        """
        size, steps = self._microbatch_size, self._accumulation_steps
        if size is None or steps is None:
            return batch
        rows = rows_of(batch)
        count = (rows + size - 1) // size
        first = tf.equal(self._model._loss_tracker.count, 0)
        agree = tf.logical_or(
            tf.equal(count, steps), tf.logical_and(count < steps, tf.logical_not(first))
        )
        if tf.executing_eagerly():
            if not agree:
                raise ValueError(sizes_disagree(int(rows), size, steps))
            return batch
        before, after = sizes_disagree("ROWS", size, steps).split("ROWS")
        check = tf.debugging.Assert(agree, [before, rows, after])
        with tf.control_dependencies([check]):
            return tf.nest.map_structure(
                lambda leaf: tf.identity(leaf) if is_array(leaf) else leaf, batch
            )


def make_train_function(model: keras.Model) -> Callable[..., Any]:
    """A `make_train_function` that keeps XLA inside the loop over micro-batches.

    Keras would compile the whole `train_step`. A loop inside an XLA program is slow on some
    devices (on CPU a convolution in it takes a thousand times longer), so only the micro-batch's
    forward and backward are compiled, and the loop around them stays a plain graph.
    """
    # Keras asks for the function once per fit, so that is when the data may still be empty.
    trained = False

    def make(force: bool = False) -> None:
        nonlocal trained
        trained = False
        if model.train_function is not None and not force:
            return
        with uncompiled(model):
            type(model).make_train_function(model, force=force)
        run = model.train_function

        def train_function(iterator: Any) -> Any:
            nonlocal trained
            try:
                results = run(iterator)
            except tf.errors.InvalidArgumentError as error:
                text = _refusal(error)
                if text is None:
                    raise
                raise ValueError(text) from error
            except (tf.errors.OutOfRangeError, StopIteration) as error:
                if trained:
                    raise
                raise ValueError(
                    "fit needs at least one batch. Got no data. "
                    "A generator can be read only once: pass a fresh one."
                ) from error
            trained = True
            return results

        model.train_function = train_function

    return make


def _refusal(error: tf.errors.InvalidArgumentError) -> str | None:
    """Text of a check that could only run inside the graph, or None if it was none of ours."""
    found = re.search(
        r"assertion failed: \[((?:microbatch_size and|All arrays of).*)\]", str(error)
    )
    # What was printed is pieces of text and numbers, each in brackets.
    return " ".join(re.split(r"\s*\] \[\s*", found[1])) if found else None


def _build_layers(model: keras.Model, x: Any) -> None:
    """Creates the variables of layers that have seen no data, and changes none.

    The window reads the statistics of a BatchNorm before its first forward.

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


def _build_optimizer(model: keras.Model) -> None:
    """Creates the optimizer's variables: it scales a loss by the first scale until it has one."""
    optimizer = model.optimizer
    if not optimizer.built and model.trainable_variables:
        # The scope in which Keras builds an optimizer at its first update: it names the variables.
        with tf.init_scope(), keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(model.trainable_variables)


def _created_outside(next_creator: Callable[..., Any], **arguments: Any) -> Any:
    """Creates a variable outside the graph that is being traced.

    Left in it, one variable makes TensorFlow trace the whole step once or twice more.
    """
    with tf.init_scope():
        return next_creator(**arguments | {"experimental_enable_variable_lifting": False})
