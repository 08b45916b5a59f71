"""The variables that a forward writes, so that it can run again from the same state."""

from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR


def state_variables(model: keras.Model) -> list[Any]:
    """Variables that a forward may write: seeds and state of layers, but no frozen weights."""
    layers = model._flatten_layers()
    found = [v for layer in layers for v in layer._non_trainable_variables]
    found += [g.state for layer in layers for g in layer._seed_generators]
    shared = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    if shared is not None:
        found.append(shared.state)
    return list({id(variable): variable for variable in found}.values())
