"""Takes rows of an array in another order, with the array's own framework.

Frameworks are looked up among the loaded modules and never imported. If a framework is not loaded,
no array can belong to it.
"""

import sys
from typing import Any

import numpy as np


def is_known(leaf: Any) -> bool:
    """Whether this is a dense array of NumPy, PyTorch, TensorFlow or JAX."""
    framework = _framework(leaf)
    if framework == "torch":
        # Nested tensors may be called strided.
        return leaf.layout is sys.modules["torch"].strided and not leaf.is_nested
    return isinstance(leaf, np.ndarray) or framework is not None


def kind(array: Any) -> str:
    """The kind of numbers in an array: "integer" (booleans too), "float" or "other"."""
    name = str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")
    if name.startswith(("int", "uint", "bool")):
        return "integer"
    return "float" if name.startswith(("float", "bfloat")) else "other"


def gathered(array: Any, rows: np.ndarray, length: int | None) -> Any:
    """Rows of an array.

    Args:
        array: a known array.
        rows: the row numbers.
        length: the part of the second axis to keep; None keeps all of it.
    """
    framework = _framework(array)
    # Trim first, so that only the kept part is copied.
    trimmed = array if length is None else array[:, :length]
    if framework == "torch":
        index = sys.modules["torch"].as_tensor(rows, device=array.device)
        return trimmed.index_select(0, index)
    if framework == "tensorflow":
        return sys.modules["tensorflow"].gather(trimmed, rows)
    if framework == "jax" and length is not None:
        # One operation, so that one program is compiled for a shape.
        return array[rows, :length]
    return trimmed[rows]


def on_host(array: Any) -> np.ndarray:
    """The values of an array, or of a list of numbers, in NumPy.

    Raises:
        ValueError: the array is a trace, which has no values, or it is not an array.
    """
    framework = _framework(array)
    if framework == "torch":
        array = array.detach().cpu()
    traced = framework == "tensorflow" and not hasattr(array, "numpy")
    if framework == "jax":
        traced = isinstance(array, sys.modules["jax"].core.Tracer)
    if traced:
        raise ValueError(
            "Rows are packed by the values of their lengths. Got lengths inside a trace, which "
            "has no values. Call pack outside of tf.function and jax.jit, and compile the loss."
        )
    try:
        return np.asarray(array)
    except ValueError as error:
        raise ValueError(
            "Values by row must be an array, or a list of numbers or text. "
            f"Got {array!r}, which is neither: {error}. Pass one entry per row."
        ) from error


def _framework(array: Any) -> str | None:
    for name, kind_of_array in (("torch", "Tensor"), ("tensorflow", "Tensor"), ("jax", "Array")):
        # An empty tuple of classes where the framework is not loaded.
        if isinstance(array, getattr(sys.modules.get(name), kind_of_array, ())):
            return name
    return None
