"""The train function of a model that accumulates on one device.

A graph writes metrics and seeds while it runs. So until a window of some shape has fitted once, all
values are copied before it runs. Then the window can run again.
"""

import math
from collections.abc import Callable, Hashable
from functools import partial
from itertools import islice
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.first_window import prove_first_window
from virtualbatch.keras._gather.detection import evaluated_eagerly
from virtualbatch.keras._guard import Guard
from virtualbatch.keras._snapshot import Snapshot
from virtualbatch.keras._tensorflow.building import build_layers, build_optimizer
from virtualbatch.keras._tensorflow.data import given_back, has_open_rows_only, taken
from virtualbatch.keras._tensorflow.plan import MEMORY
from virtualbatch.keras._tensorflow.train_function import in_our_words, plain_train_function
from virtualbatch.tensorflow._checks import flat_leaves
from virtualbatch.window.tree import array_leaves, common_rows


def make_device_train_function(model: keras.Model, backend: Backend) -> Callable[..., Any]:
    """A `make_train_function` that keeps XLA inside the loop over micro-batches.

    Keras would compile the whole `train_step`. A loop inside an XLA program is slow on some
    devices (on CPU a convolution in it takes a thousand times longer), so only the micro-batch's
    forward and backward are compiled, and the loop around them stays a plain graph. Cause of the
    slow convolution: https://github.com/jax-ml/jax/issues/12868

    Args:
        model: the model; its `train_step` is ours.
        backend: our implementation for Keras' backend.
    """
    step = model.train_step
    guard = Guard(model, step, MEMORY)
    # Whether this fit has had a batch. Keras calls `make` once per fit.
    trained = False

    def make(force: bool = False) -> None:
        nonlocal trained
        trained = False
        # A strategy's scope may have been entered since `accumulate`.
        backend.refuse(model)
        if model.train_function is not None and not force:
            return
        guard.forget()
        run = plain_train_function(model)

        def train_function(iterator: Any) -> Any:
            nonlocal trained, run
            with in_our_words(trained):
                results = guarded(iterator)
            trained = True
            if guard.succeeded():
                run = plain_train_function(model)
            logs: dict[str, Any] = step.told(results)
            return logs

        def guarded(iterator: Any) -> Any:
            """The results of the next batches. Shapes that have fitted cost no extra work."""
            shapes: Hashable
            from_dataset = isinstance(iterator, tf.data.Iterator)
            spec = iterator.element_spec if from_dataset else None
            if from_dataset and has_open_rows_only(spec):
                shapes = tuple(tf.nest.flatten(spec))
                if guard.fitted(shapes):
                    return run(iterator)
                batches = taken(iterator, model.steps_per_execution)
            else:
                if from_dataset:
                    batches = taken(iterator, model.steps_per_execution)
                else:
                    batches = list(islice(iterator, model.steps_per_execution))
                shapes = tuple(getattr(x, "shape", None) for x in _leaves(batches))
            if not batches:
                return run(iterator)
            feed = partial(given_back, batches, spec) if from_dataset else partial(iter, batches)
            if guard.fitted(shapes):
                return run(feed())
            results = first_of_its_shape(batches, feed, from_dataset)
            if step.is_known() or not from_dataset:
                guard.remember(shapes)
            return results

        def first_of_its_shape(batches: list[Any], feed: Callable[[], Any], open_rows: bool) -> Any:
            largest = max(batches, key=lambda batch: (_rows(batch), _size(batch)))
            given = keras.utils.unpack_x_y_sample_weight(largest)
            # The variables that the first window would create must exist before they are copied.
            build_layers(model, given[0])
            build_optimizer(model)
            snapshot = Snapshot(model)

            def make_again() -> None:
                nonlocal run
                run = plain_train_function(model)

            def look_for_coupled() -> bool:
                return step.look_for_coupled(given, _rows(largest), evaluated_eagerly)

            if open_rows and look_for_coupled():
                # Do this now: the program also serves other numbers of rows.
                make_again()
            return guard.run(
                given,
                _rows(largest),
                lambda: run(feed()),
                snapshot.restore,
                make_again,
                lambda limit: backend.plan(model, largest, limit, step.found(given)),
                lambda size: prove_first_window(
                    model, step, given, _rows(largest), size, backend, MEMORY.errors
                ),
                look_for_coupled,
            )

        model.train_function = train_function

    return make


def _rows(batch: Any) -> int:
    return common_rows(array_leaves(batch)) or 0


def _size(batch: Any) -> int:
    # Lengths that a ragged array does not know count as 1.
    shapes = [tf.TensorShape(array.shape).as_list() for _, array in array_leaves(batch)]
    return sum(math.prod(length or 1 for length in shape) for shape in shapes)


def _leaves(batches: Any) -> list[Any]:
    try:
        return list(tf.nest.flatten(batches))
    except (TypeError, ValueError):
        # This is slower, but its refusals say what is wrong.
        return flat_leaves("batch", batches)
