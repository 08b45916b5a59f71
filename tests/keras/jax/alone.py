"""Keras on JAX in a program of its own, as `tests/keras/conftest.py` sets it for tests."""

import sys
import warnings

import jax
import keras
from keras.src.backend.common import dtypes


def alone() -> None:
    """Sets float64, and makes warnings errors."""
    # Keras would load it to set a seed, which takes longer than most of what is run.
    sys.modules["tensorflow"] = None  # type: ignore[assignment]
    warnings.simplefilter("error")
    # NumPy's word about variables of Keras, which Keras itself reads through NumPy.
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")
    jax.config.update("jax_enable_x64", True)
    # Else means of float64 are rounded to float32.
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
