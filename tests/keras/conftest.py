"""Every test of this folder runs in float64, from the same seeds, and leaves Keras as it was.

The backend under test is Keras': `KERAS_BACKEND=torch python -m pytest tests/keras`.
"""

import gc
from pathlib import Path

import keras
import pytest
from keras.src.backend.common import dtypes
from tests.keras.backends import BACKEND, available, ignored
from tests.keras.neutral import leave_out

# Selection, not a skip: on its own backend every folder is collected.
collect_ignore = ignored(BACKEND)
if not available("values in call"):
    collect_ignore.append("test_inside_a_window.py")

if BACKEND == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)
if BACKEND == "tensorflow":
    import tensorflow as tf

    # Two devices, for strategies with replicas; what names none runs on the first.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
if BACKEND == "torch":
    import torch

    # Threads for arrays of this size mostly wait for each other, and use the processor for it.
    torch.set_num_threads(1)


def pytest_collection_finish():
    # What imports have made lives as long as the process; each full collection would walk it.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    leave_out(items, BACKEND)
    # NumPy's word about variables of Keras, which Keras itself reads through NumPy.
    allowed = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(allowed)


@pytest.fixture(autouse=True)
def _float64(monkeypatch):
    # Outside TensorFlow, Keras rounds to float32 inside means and divisions of float64 models, and
    # a reference that is off by 6e-8 is none.
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
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
