"""Two devices, and seeds, for every test of this folder."""

import keras
import pytest
import tensorflow as tf

# Before TensorFlow starts; only strategies use the second one.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(autouse=True)
def _seeds():
    keras.utils.set_random_seed(0)
