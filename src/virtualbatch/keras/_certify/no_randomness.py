"""Turns off dropout, noise and other randomness of a model for the length of a context."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras

# An attribute that says how strong a layer's randomness is has one of these words in its name.
_AMOUNTS = ("rate", "drop", "stddev")


class Drawing(NamedTuple):
    """Names of layers that draw random numbers.

    Fields:
        quieted: those that were turned off.
        left: those that could not be turned off.
    """

    quieted: list[str]
    left: list[str]


@contextmanager
def without_randomness(model: keras.Model) -> Iterator[Drawing]:
    """Turns off the randomness of layers through their attributes, and puts those back.

    A layer that draws random numbers holds a seed generator. A number (`rate`,
    `recurrent_dropout`, `drop_path_rate`, `stddev`) says how strong the randomness is, and is set
    to 0. Keras' augmentations have no such number, so they run as in inference.

    Yields:
        The layers that draw random numbers.
    """
    changed: list[tuple[Any, str, Any]] = []
    drawing = Drawing([], [])

    def set_to(owner: Any, name: str, value: Any) -> None:
        changed.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = value

    for layer in model._flatten_layers():
        before = len(changed)
        if layer._seed_generators:
            for name in [name for name, value in vars(layer).items() if _is_amount(name, value)]:
                set_to(layer, name, 0.0)
            if len(changed) == before and type(layer).__module__.startswith("keras."):
                set_to(layer, "call", as_in_inference(layer))
        elif isinstance(layer, keras.layers.TorchModuleWrapper):
            for module in layer.module.modules():
                if "Dropout" in type(module).__name__ and module.p:
                    set_to(module, "p", 0.0)
        if len(changed) > before:
            drawing.quieted.append(layer.name)
        elif layer._seed_generators:
            drawing.left.append(layer.name)
    try:
        yield drawing
    finally:
        for owner, name, value in reversed(changed):
            if name == "call":
                del vars(owner)[name]
            else:
                vars(owner)[name] = value


def _is_amount(name: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value != 0 and any(amount in name for amount in _AMOUNTS)


def as_in_inference(layer: Any) -> Callable[..., Any]:
    """A `call` for the layer that always runs in inference."""

    def call(*args: Any, **options: Any) -> Any:
        return type(layer).call(layer, *args, **options | {"training": False})

    return call
