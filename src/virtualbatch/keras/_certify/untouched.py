"""Saves attributes of layers and the process's random numbers, and puts them back."""

import random
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR


class Attributes:
    """The attributes of all layers: which objects they hold, not the contents of these objects.

    Args:
        model: a model that is built.
    """

    def __init__(self, model: keras.Model):
        self._layers = [(layer, dict(vars(layer))) for layer in model._flatten_layers()]

    def restore(self) -> None:
        """Puts everything back."""
        for layer, attributes in self._layers:
            vars(layer).clear()
            vars(layer).update(attributes)


class RandomNumbers:
    """The states of the random generators of Python, NumPy and Keras."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._keras = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
        self._seed: Any = None
        if self._keras is not None:
            self._seed = np.array(keras.ops.convert_to_numpy(self._keras.state.value))

    def restore(self) -> None:
        """Puts everything back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, self._keras)
        if self._keras is not None:
            self._keras.state.assign(self._seed)
