"""Every test of this folder runs in float64, from the same seeds, and leaves Keras as it was."""

import gc

import keras
import pytest


@pytest.fixture(autouse=True)
def _float64():
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(autouse=True, scope="module")
def _memory():
    yield
    # Graphs hold each other; collecting them after every test would take a third of the time.
    gc.collect()
