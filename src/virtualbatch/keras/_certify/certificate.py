"""Certifies the train step of a Keras model, and leaves the model unchanged."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.diagnosis import certified
from virtualbatch.certify.step import check_microbatches
from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.full_precision import in_full_precision
from virtualbatch.keras._certify.no_randomness import without_randomness
from virtualbatch.keras._certify.step import NUMBERS, KerasStep
from virtualbatch.keras._certify.untouched import Attributes, RandomNumbers
from virtualbatch.keras._gather.detection import found_as_asked
from virtualbatch.keras._gather.gathering import Found
from virtualbatch.keras._snapshot import Snapshot
from virtualbatch.window.cut import rows_per_microbatch
from virtualbatch.window.tree import array_leaves, common_rows


def build_symbolically(model: keras.Model, batch: Any) -> None:
    """Builds model, losses, metrics and optimizer without running them."""
    model._symbolic_build(data_batch=batch)


def certificate(
    model: keras.Model,
    batch: Any,
    size: int | None,
    steps: int | None,
    backend: Backend,
    gather: bool | Found | None,
) -> Certificate:
    """The certificate of a compiled model; see `virtualbatch.keras.certify`.

    Args:
        model: the model.
        batch: (x, y, sample_weight) as the user gives them.
        size: checked rows of one micro-batch, or None.
        steps: checked micro-batches per window, or None.
        backend: our implementation for Keras' backend.
        gather: the setting of `accumulate`, or what is known about the model's loss already.

    Raises:
        ValueError: there is one row, or one micro-batch, or rows of an array differ in length.
        TypeError: an array holds something other than numbers and strings.
    """
    batch = arrays(batch)
    check_numbers_or_strings(batch)
    rows = common_rows(array_leaves(batch))
    if rows is None:
        raise ValueError("internal: a batch of arrays has no number of rows.")
    size = rows_per_microbatch(rows, size, steps)
    check_microbatches(backend.cut(rows, size))
    backend.build(model, batch)
    with ExitStack() as held:
        held.enter_context(untouched(model, backend, Snapshot(model)))
        notes = []
        drawing = held.enter_context(without_randomness(model))
        if drawing.quieted:
            notes.append(
                f"Randomness was turned off for the comparison ({', '.join(drawing.quieted)}): "
                "every micro-batch draws its own."
            )
        if drawing.left:
            notes.append(
                f"Randomness in {', '.join(drawing.left)} could not be turned off, so it counts "
                "as a difference."
            )
        if held.enter_context(in_full_precision(model)):
            notes.append("Half precision was replaced by float32 for the comparison.")
        found = found_as_asked(model, batch, rows, backend.evaluate, gather)
        return certified(KerasStep(model, batch, rows, size, backend, notes, found))


@contextmanager
def untouched(model: keras.Model, backend: Backend, snapshot: Snapshot) -> Iterator[None]:
    """Puts back values, attributes of layers, gradients and random numbers.

    Args:
        model: a model that is built.
        backend: our implementation for Keras' backend.
        snapshot: the values to put back.
    """
    attributes, random = Attributes(model), RandomNumbers()
    kept = [snapshot, *backend.kept(model)]
    try:
        yield
    finally:
        attributes.restore()
        for each in kept:
            each.restore()
        random.restore()


def arrays(batch: Any) -> Any:
    """The batch as NumPy arrays, with floats in the dtype to which `fit` would cast them.

    Raises:
        ValueError: the rows of an array differ in length.
    """

    def array(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        if hasattr(leaf, "row_splits"):
            raise ValueError(
                "certify compares arrays row by row, so rows must have one length. Got a "
                "RaggedTensor. Pass it padded and masked, which fit takes too."
            )
        values = np.asarray(keras.ops.convert_to_numpy(leaf) if keras.ops.is_tensor(leaf) else leaf)
        if values.dtype.kind not in NUMBERS:
            return leaf
        return values.astype(keras.config.floatx()) if values.dtype.kind == "f" else values

    return keras.tree.map_structure(array, batch)


def check_numbers_or_strings(batch: Any) -> None:
    """Refuses arrays of other objects, because no backend takes them.

    Args:
        batch: the result of `arrays`.

    Raises:
        TypeError: an array holds something other than numbers and strings.
    """
    for leaf in keras.tree.flatten(batch):
        # A tensor holds no objects. NumPy does not have every dtype of tensors, so do not convert.
        if keras.ops.is_tensor(leaf) or not hasattr(leaf, "shape"):
            continue
        values = np.asarray(leaf)
        if values.dtype.kind != "O":
            continue
        strange = [type(x).__name__ for x in values.flat if not isinstance(x, str | bytes)]
        if strange:
            raise TypeError(
                "A batch must be made of arrays of numbers or strings. "
                f"Got {type(leaf).__name__} with objects of type {strange[0]}. "
                "Pass arrays as fit yields them."
            )
