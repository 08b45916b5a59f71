"""Attributes of layers and random numbers of the process, as they are now and put back."""

import random
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR


class Attributes:
    """Attributes of all layers: which objects they hold, not what is in those.

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
    """Where the generators of Python, NumPy and Keras stand."""

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
