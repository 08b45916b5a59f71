"""The models and data that the benchmarks share."""

import keras
import numpy as np
from keras import layers


def mlp() -> keras.Model:
    """Three small dense layers on 64 features: the time is mostly overhead."""
    return keras.Sequential(
        [
            layers.Input((64,)),
            layers.Dense(128, activation="relu"),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def cnn() -> keras.Model:
    """Three small convolutions on 16 x 16 images: the time is mostly arithmetic."""
    return keras.Sequential(
        [
            layers.Input((16, 16, 1)),
            layers.Conv2D(16, 3, activation="relu", padding="same"),
            layers.Conv2D(32, 3, activation="relu", padding="same"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


MODELS = {"MLP": mlp, "CNN": cnn}


def data(name: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Seeded random inputs and classes for a model."""
    rng = np.random.default_rng(0)
    shape = {"MLP": (64,), "CNN": (16, 16, 1)}[name]
    return rng.normal(size=(rows, *shape)).astype("float32"), rng.integers(0, 10, rows)
