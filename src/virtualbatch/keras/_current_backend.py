"""Finds our implementation for the backend that Keras runs on."""

from typing import Any

import keras

from virtualbatch.keras._backend import Backend
from virtualbatch.keras._checks import check_model


def backend_for(model: Any) -> Backend:
    """Our implementation for Keras' backend, after checking that it can train the model."""
    keras_backend = current_backend()
    check_model(model)
    keras_backend.refuse(model)
    return keras_backend


def current_backend() -> Backend:
    """Our implementation for Keras' backend. Only that backend's framework is imported.

    Raises:
        NotImplementedError: we do not support the backend.
    """
    match keras.backend.backend():
        case "tensorflow":
            from virtualbatch.keras._tensorflow.step import BACKEND as tensorflow

            return tensorflow
        case "torch":
            from virtualbatch.keras._torch.step import BACKEND as torch

            return torch
        case "jax":
            from virtualbatch.keras._jax.step import BACKEND as jax

            return jax
        case other:
            raise NotImplementedError(
                "accumulate works on Keras' TensorFlow, JAX and PyTorch backends. "
                f"Got the backend {other!r}. Set KERAS_BACKEND to tensorflow, jax or torch."
            )
