"""Quantised layers and adapters: what trains is updated as by the whole batch."""

import keras
import numpy as np
import pytest
from keras import layers
from tests.keras.problems import FEATURES, LABELS, X, compiled
from tests.keras.training import ROWS, Case, assert_equals_keras

import virtualbatch.keras as vb

# Quantised layers compute in float32, and four updates add up 50 rows each. In front of a float8
# layer Keras rounds the gradient of the bias to bfloat16, for each micro-batch.
SINGLE, BFLOAT16 = 1e-5, 2.0**-8


def quantised(mode, rank=None, dtype="float32"):
    """A classifier whose hidden layer is quantised, with an adapter or none."""
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(4, activation="tanh", dtype=dtype),
            layers.Dense(3),
        ]
    )
    if mode is not None:
        model.layers[0].quantize(mode)
    if rank is not None:
        model.layers[0].enable_lora(rank)
    return model


@pytest.mark.parametrize(
    "mode",
    [
        "int8",
        pytest.param(None, marks=pytest.mark.thorough("the adapter of a layer as it was")),
    ],
)
def test_an_adapter_equals_keras(mode):
    case = Case("", lambda: quantised(mode, 2), compiled(), X, LABELS)
    assert_equals_keras(case, SINGLE)


@pytest.mark.thorough("whole runs; the values that are merged stand in the next test")
def test_float8_equals_keras():
    case = Case("", lambda: quantised("float8"), compiled(), X, LABELS, rows=ROWS)
    # Eagerly TensorFlow does not take Keras' gradient of a float8 layer.
    assert_equals_keras(case, BFLOAT16, in_its_mode=True)


def float8_after_two_updates(dtype="float32", noise=False):
    """Values of a layer of one weight, which has seen four rows of 1, each its own micro-batch."""
    layer = layers.Dense(1, kernel_initializer="ones", dtype=dtype)
    model = keras.Sequential([keras.Input((1,)), layer])
    layer.quantize("float8")
    model.compile("sgd", "mse")
    vb.accumulate(model, microbatch_size=1)
    found = vb.NoiseScale()
    model.fit(np.ones((4, 1)), np.zeros((4, 1)), batch_size=4, epochs=2, verbose=0,
              callbacks=[found] if noise else [])  # fmt: skip
    values = {v.name: float(keras.ops.convert_to_numpy(v).max()) for v in layer.variables}
    return values, found


def test_maxima_and_scales_of_float8_are_those_of_the_batch():
    values, _ = float8_after_two_updates()
    assert values["inputs_amax_history"] == 1.0
    assert values["inputs_scale"] == np.float32(1 / 448)


@pytest.mark.thorough("the same for weights that are themselves in half precision")
def test_maxima_of_gradients_are_not_those_of_a_micro_batch_alone():
    wide, _ = float8_after_two_updates()
    narrow, _ = float8_after_two_updates("bfloat16")
    np.testing.assert_allclose(
        narrow["outputs_grad_amax_history"], wide["outputs_grad_amax_history"], rtol=2**-7
    )


def test_the_noise_scale_leaves_scales_and_maxima_out():
    _, found = float8_after_two_updates(noise=True)
    # Rows are alike: there is no noise. A maximum among the gradients would be some.
    assert found.windows == 2
    assert found.estimate().noise == pytest.approx(0.0, abs=1e-5)
