"""The private parts of TensorFlow that the engine stands on; an upgrade breaks here first."""

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import op_callbacks
from tests.private_names import private_imports, private_names


def test_every_private_name_in_use_is_named_here():
    # Keras' variables hold TensorFlow's there; eager random numbers follow from the other.
    assert private_names("tensorflow") == {"_value", "_rng"}
    imports = private_imports("tensorflow", r"tensorflow\.python")
    assert imports == {
        "tensorflow.python.framework.op_callbacks",
        "tensorflow.python.eager.context",
    }


def test_tensorflow_has_them():
    assert callable(op_callbacks.add_op_callback)
    assert callable(op_callbacks.remove_op_callback)
    tf.random.set_seed(1)
    assert callable(context.context()._rng.getstate)
    assert callable(context.context().clear_kernel_cache)
    assert callable(tf.__internal__.autograph.tf_convert)
    assert callable(tf.__internal__.autograph.control_status_ctx)
