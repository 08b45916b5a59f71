"""Batches of several replicas: takes them from their iterator, joins them, and gives them back."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._tensorflow.data import over_batches
from virtualbatch.tensorflow._arrays import is_array
from virtualbatch.window.tree import array_leaves, common_rows


def build_from_a_first_batch(model: keras.Model) -> Callable[..., None]:
    """A `_maybe_symbolic_build` that loses no rows of a generator, and takes any first batch.

    Before Keras trains on replicas, it reads a batch through an iterator that reads ahead. A
    generator cannot give that batch again. Keras also builds the model from a mean over replicas,
    which fails if replicas have different numbers of rows, or text.

    Args:
        model: the model.
    """

    def build(iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is not None:
            data_batch = _first_batch(iterator, model.distribute_strategy)
        type(model)._maybe_symbolic_build(model, None, data_batch)

    return build


def _first_batch(epoch: Any, strategy: tf.distribute.Strategy) -> Any:
    """The first batch of an epoch, or one replica's part of it."""
    looked_at = getattr(epoch.data_adapter, "_first_batches", None)
    if looked_at:
        return looked_at[0]
    _, _, iterator = next(iter(epoch))
    return local_batches(next(iterator), strategy)[0]


def divided(batch: Any, strategy: tf.distribute.Strategy) -> Any:
    """A batch of `train_on_batch` with its rows divided among replicas, as `fit` does.

    Keras would give every replica all rows.
    """
    rows = common_rows(array_leaves(batch)) or 0
    most = -(-rows // strategy.num_replicas_in_sync)

    def parts(leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        array = tf.convert_to_tensor(leaf)
        return strategy.experimental_distribute_values_from_function(
            lambda context: array[
                most * context.replica_id_in_sync_group : most
                * (context.replica_id_in_sync_group + 1)
            ]
        )

    return tf.nest.map_structure(parts, batch)


def local_batches(batch: Any, strategy: tf.distribute.Strategy) -> list[Any]:
    """Each replica's part of a batch."""
    leaves = [
        strategy.experimental_local_results(leaf) if leaf is not None else None
        for leaf in tf.nest.flatten(batch)
    ]
    return [
        tf.nest.pack_sequence_as(batch, [None if leaf is None else leaf[k] for leaf in leaves])
        for k in range(strategy.num_replicas_in_sync)
    ]


def together(batches: list[Any]) -> Any:
    """The rows of some batches as one batch."""
    return tf.nest.map_structure(
        lambda *leaves: None if leaves[0] is None else tf.concat(leaves, 0), *batches
    )


def distributed(batches: list[Any], spec: Any, strategy: tf.distribute.Strategy) -> Iterator[Any]:
    """A fresh iterator over batches of all replicas, with their original spec.

    Args:
        batches: at least one batch, as the iterator of a distributed dataset gives it.
        spec: `element_spec` of that iterator.
        strategy: the strategy of the replicas.
    """
    # Replicas take the elements of their dataset in turns.
    local = [part for batch in batches for part in local_batches(batch, strategy)]
    first = tf.nest.map_structure(lambda leaf: leaf._component_specs[0], spec)
    return iter(
        strategy.distribute_datasets_from_function(lambda context: over_batches(local, first))
    )
