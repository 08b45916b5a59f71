"""Runs a function of a model once on JAX, as one program that XLA does not optimise."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras

from virtualbatch.jax._compiled_quickly import compiled_quickly
from virtualbatch.keras._jax.devices import on_every_device


def evaluated(model: keras.Model, function: Callable[[Any], Any], given: Any) -> Sequence[Any]:
    """See `virtualbatch.keras._gather.detection.Evaluate`."""
    variables = model.variables

    def run(values: list[Any], given: Any) -> Any:
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return function(given)

    program = compiled_quickly(run)
    with on_every_device():
        found: Sequence[Any] = jax.device_get(program([v.value for v in variables], given))
    return found
