"""Records what the layers of a model compute, in the order of their calls."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import tree

from virtualbatch.certify.activations import Recording


@contextmanager
def recorded(model: keras.Model, is_concrete: Callable[[Any], bool]) -> Iterator[Recording]:
    """Records inputs and outputs of all layers, operations and losses inside the context.

    If an input differs but all outputs before it agree, the difference arose between layers, in
    the model's code that calls them.

    Args:
        model: a model that is built and compiled.
        is_concrete: tensor -> whether its value can be read.

    Yields:
        The recording.
    """
    recording = Recording()

    def note(where: str, layer: str, values: Any) -> None:
        for value in tree.flatten(values):
            if not (keras.ops.is_tensor(value) and is_concrete(value)):
                continue
            array = np.asarray(keras.ops.convert_to_numpy(value))
            if array.dtype.kind not in "OSU":
                recording.add(where, layer, array.astype(np.float64))

    def listener(owner: Any, where: str, called: Callable[..., Any]) -> Callable[..., Any]:
        layer = type(owner).__name__

        def call(*args: Any, **options: Any) -> Any:
            note(f"the input of {where}", "", args)
            outputs = called(*args, **options)
            note(where, layer, outputs)
            return outputs

        return call

    def loss_listener(loss: Any, where: str) -> Callable[..., Any]:
        def call(y_true: Any, y_pred: Any) -> Any:
            values = type(loss).call(loss, y_true, y_pred)
            note(where, type(loss).__name__, values)
            return values

        return call

    owners = [(layer, place_of(layer)) for layer in _operations(model)]
    losses = {
        id(entry.loss): (entry.loss, f"the loss {entry.loss.name}")
        for entry in compiled_losses(model)
        if type(entry.loss).__call__ is keras.losses.Loss.__call__
    }
    before = [(owner, vars(owner).get("call")) for owner, _ in [*owners, *losses.values()]]
    for owner, where in owners:
        vars(owner)["call"] = listener(owner, where, owner.call)
    for loss, where in losses.values():
        vars(loss)["call"] = loss_listener(loss, where)
    try:
        yield recording
    finally:
        for owner, own in before:
            if own is None:
                del vars(owner)["call"]
            else:
                vars(owner)["call"] = own


def place_of(layer: Any) -> str:
    """A layer in words: its path and class."""
    return f"{getattr(layer, 'path', None) or layer.name} ({type(layer).__name__})"


def compiled_losses(model: keras.Model) -> list[Any]:
    """Keras' entries for the losses of a compiled model; empty before the loss is built."""
    return getattr(model._compile_loss, "_flat_losses", None) or []


def _operations(model: keras.Model) -> Sequence[Any]:
    """The layers of a model and the other operations of functional models, each once."""
    layers = list(model._flatten_layers())
    between = [op for layer in layers for op in getattr(layer, "_operations", [])]
    return list({id(found): found for found in [*layers, *between]}.values())
