"""The train function of a model that accumulates on several replicas.

The first window is checked on one device, with the rows of all replicas, before any replica starts.
A replica that fails alone would leave the others waiting.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.first_window import prove_first_window
from virtualbatch.keras._checks import named_strategy
from virtualbatch.keras._tensorflow.data import taken
from virtualbatch.keras._tensorflow.distributed_data import (
    distributed,
    divided,
    local_batches,
    together,
)
from virtualbatch.keras._tensorflow.one_replica import outside_of_scopes
from virtualbatch.keras._tensorflow.plan import MEMORY
from virtualbatch.keras._tensorflow.train_function import in_our_words, plain_train_function
from virtualbatch.window.tree import array_leaves, common_rows


def make_replica_train_function(model: keras.Model, backend: Backend) -> Callable[..., None]:
    """A `make_train_function` for a model whose strategy has several replicas.

    Args:
        model: the model; its `train_step` is ours.
        backend: our implementation for Keras' backend.
    """
    step = model.train_step
    strategy = model.distribute_strategy
    trained = False

    def make(force: bool = False) -> None:
        nonlocal trained
        trained = False
        if model.train_function is not None and not force:
            return
        run = plain_train_function(model)
        looked_at: set[Any] = set()

        def train_function(iterator: Any) -> Any:
            nonlocal trained
            with in_our_words(trained):
                results = attempt(feed(iterator))
            trained = True
            logs: dict[str, Any] = step.told(results)
            # Inside, each replica knows only its own metrics. Read outside, they are summed.
            metrics = model.get_metrics_result()
            return {name: metrics.get(name, value) for name, value in logs.items()}

        def attempt(iterator: Any) -> Any:
            try:
                return run(iterator)
            except MEMORY.errors.kinds as error:
                if not MEMORY.errors.is_certain(error):
                    raise
                raise MemoryError(
                    "Replicas that ran out of memory cannot run their batch again. "
                    f"Got {named_strategy(model)}. Start again with {step.next_to_try()}."
                ) from error

        def feed(iterator: Any) -> Any:
            """An iterator over the same batches, after batches of new shapes were checked."""
            from_dataset = isinstance(iterator, tf.distribute.DistributedIterator)
            if from_dataset:
                spec = iterator.element_spec
                shapes = tuple(tf.nest.flatten(spec))
                if shapes in looked_at and model.steps_per_execution == 1:
                    return iterator
                batches = taken(iterator, model.steps_per_execution)
            else:
                given = list(islice(iterator, model.steps_per_execution))
                shapes = tuple(getattr(x, "shape", None) for x in tf.nest.flatten(given))
                batches = [divided(batch, strategy) for batch in given]
            if not batches:
                return iterator
            if shapes not in looked_at:
                with outside_of_scopes():
                    look_at(max((local_batches(x, strategy) for x in batches), key=_most_rows))
                if step.is_known():
                    looked_at.add(shapes)
            # TensorFlow cannot run Keras' loop over several batches with collectives in it.
            if from_dataset and model.steps_per_execution == 1:
                return distributed(batches, spec, strategy)
            return iter(batches)

        def look_at(local: list[Any]) -> None:
            """Checks on one device, with the rows of all replicas, that micro-batches add up."""
            nonlocal run
            given = keras.utils.unpack_x_y_sample_weight(together(local))
            rows = common_rows(array_leaves(given)) or 0
            if step.look_for_coupled(given, rows, backend.evaluate):
                run = plain_train_function(model)
            size = step.rows_asked_for(_most_rows(local))
            prove_first_window(model, step, given, rows, size, backend, MEMORY.errors)

        model.train_function = train_function

    return make


def _most_rows(local: list[Any]) -> int:
    """The largest number of rows on a replica."""
    return max(array.shape[0] for batch in local for _, array in array_leaves(batch))
