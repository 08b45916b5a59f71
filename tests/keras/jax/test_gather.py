"""What JAX compiles where losses see all rows: two loops, their convolutions in the fast order."""

from functools import partial

import jax
import keras
import numpy as np
from keras import layers
from tests.keras import coupled

import virtualbatch.keras as vb
from virtualbatch.jax._convolution import _convolutions, _is_slow

ROWS, MICRO = 16, 4
IMAGES = np.random.default_rng(0).normal(size=(ROWS, 6, 6, 2))
MASKS = coupled.MASKS[:ROWS]


def program():
    """The step of a convolutional model with Dice, traced."""
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.Conv2D(3, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(6, activation="sigmoid"),
        ]
    )
    model.compile("sgd", keras.losses.Dice())
    vb.accumulate(model, microbatch_size=MICRO)
    model._symbolic_build(data_batch=(IMAGES, MASKS, None))
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
        purge_model_variables=False,
    )
    return jax.make_jaxpr(partial(type(model.train_step).__call__, model.train_step))(
        state, (IMAGES, MASKS)
    )


def test_each_pass_is_one_loop_with_fast_convolutions():
    found = program()
    loops = [equation for equation in found.eqns if equation.primitive.name == "scan"]
    assert [loop.params["length"] for loop in loops] == [ROWS // MICRO] * 2
    # A convolution in another order would take ten times as long in a loop.
    convolutions = list(_convolutions(found.jaxpr))
    assert convolutions
    assert not any(map(_is_slow, convolutions))
