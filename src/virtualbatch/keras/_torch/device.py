"""The device that Keras puts tensors on."""

import torch
from keras import ops


def device() -> torch.device:
    """The device that Keras puts tensors on."""
    return ops.zeros(()).device


def place() -> torch.device | None:
    """The device that Keras puts tensors on; None for the CPU."""
    found = device()
    return None if found.type == "cpu" else found
