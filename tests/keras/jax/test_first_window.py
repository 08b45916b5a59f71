"""The first window of `fit`, which takes the values out of the variables of a model."""

import keras
import numpy as np
from keras import layers

from virtualbatch.keras._jax.held import holding
from virtualbatch.keras._jax.stateless import State


def test_variables_hold_the_state_for_the_first_window_only():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    state = State(
        *model._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=True,
            metrics_variables=True,
            purge_model_variables=True,
        )
    )
    kernel = model.trainable_variables[0]
    with holding(model, state):
        np.testing.assert_array_equal(kernel.numpy(), state.trainable[0])
    # A second copy of the weights would stay for an epoch.
    assert kernel._value is None
