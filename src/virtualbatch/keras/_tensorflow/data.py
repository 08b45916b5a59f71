"""Takes batches out of a tf.data iterator, and gives them back in a fresh one."""

from typing import Any

import tensorflow as tf


def taken(iterator: Any, most: int) -> list[Any]:
    """The next batches of an iterator. There are fewer if it ends.

    Args:
        iterator: a `tf.data.Iterator`, or the iterator of a distributed dataset.
        most: the largest number of batches.
    """
    batches: list[Any] = []
    while len(batches) < most:
        found = iterator.get_next_as_optional()
        if not found.has_value():
            break
        batches.append(found.get_value())
    return batches


def given_back(batches: list[Any], spec: Any) -> Any:
    """A fresh iterator over batches, with their original spec if possible.

    Args:
        batches: at least one batch.
        spec: `element_spec` of the iterator from which they were taken.
    """
    return iter(over_batches(batches, spec))


def over_batches(batches: list[Any], spec: Any) -> tf.data.Dataset:
    """A dataset of batches, with their original spec if possible.

    A function is traced for the spec of its iterator. The spec of a single batch has a fixed number
    of rows. So a longer batch is added behind, which opens the spec and is never read.

    Args:
        batches: at least one batch.
        spec: see `given_back`.
    """
    first, *others = batches
    dataset = tf.data.Dataset.from_tensors(first)
    for batch in others:
        dataset = dataset.concatenate(tf.data.Dataset.from_tensors(batch))
    if dataset.element_spec != spec:
        longer = tf.nest.map_structure(_longer, first, spec)
        dataset = dataset.concatenate(tf.data.Dataset.from_tensors(longer))
    return dataset.take(len(batches))


def has_open_rows_only(spec: Any) -> bool:
    """Whether batches of a spec can differ only in their number of rows."""
    return all(
        isinstance(found, tf.TensorSpec) and None not in found.shape.as_list()[1:]
        for found in tf.nest.flatten(spec)
        if not isinstance(found, tf.NoneTensorSpec | tf.OptionalSpec)
    )


def _longer(tensor: Any, spec: Any) -> Any:
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
        return tensor
    for axis, length in enumerate(spec.shape):
        if length is None:
            tensor = tf.concat([tensor, tf.gather(tensor, [0], axis=axis)], axis)
    return tensor
