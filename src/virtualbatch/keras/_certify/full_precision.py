"""Replaces half precision in a model by float32 for the length of a context."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from virtualbatch.keras._certify.activations import compiled_losses

_HALF = ("float16", "bfloat16")


@contextmanager
def in_full_precision(model: keras.Model) -> Iterator[bool]:
    """Replaces half-precision policies and values by float32; float32 and float64 stay.

    Args:
        model: a model that is built and compiled.

    Yields:
        Whether anything was in half precision.
    """
    full = keras.DTypePolicy("float32")
    policies = [
        (layer, layer._dtype_policy)
        for layer in model._flatten_layers()
        if layer.compute_dtype in _HALF and layer.quantization_mode is None
    ]
    losses = [
        (entry.loss, entry.loss._dtype)
        for entry in compiled_losses(model)
        if getattr(entry.loss, "_dtype", None) in _HALF
    ]
    variables = [
        (variable, variable._dtype, _held(variable))
        for variable in {id(variable): variable for variable in model.variables}.values()
        if variable._dtype in _HALF
    ]
    try:
        for layer, _ in policies:
            vars(layer)["_dtype_policy"] = full
        for loss, _ in losses:
            vars(loss)["_dtype"] = "float32"
        for variable, _, _ in variables:
            _widen(variable)
        yield bool(policies or losses or variables)
    finally:
        for layer, policy in policies:
            vars(layer)["_dtype_policy"] = policy
        for loss, dtype in losses:
            vars(loss)["_dtype"] = dtype
        for variable, dtype, held in variables:
            variable._dtype = dtype
            if keras.backend.backend() == "torch":
                variable._value.data = held
            else:
                variable._value = held


def _held(variable: Any) -> Any:
    # PyTorch's modules keep the parameter object itself, so only its contents can be replaced.
    return variable._value.data if keras.backend.backend() == "torch" else variable._value


def _widen(variable: Any) -> None:
    value = np.asarray(keras.ops.convert_to_numpy(variable.value), np.float32)
    variable._dtype = "float32"
    if keras.backend.backend() == "torch":
        variable._value.data = variable._value.data.float()
    elif keras.backend.backend() == "jax":
        variable._value = keras.ops.convert_to_tensor(value, "float32")
    else:
        variable._initialize(value)
