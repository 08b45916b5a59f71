"""The private parts of TensorFlow that the engine stands on; an upgrade breaks here first."""

import tensorflow as tf
from tensorflow.python.eager import context, forwardprop_util, record
from tensorflow.python.framework import auto_control_deps_utils, op_callbacks
from tests.private_names import private_imports, private_names


def test_every_private_name_in_use_is_named_here():
    # Keras' variables hold TensorFlow's there; eager random numbers follow from the other.
    assert private_names("tensorflow") == {"_value", "_rng"}
    imports = private_imports("tensorflow", r"tensorflow\.python")
    assert imports == {
        "tensorflow.python.framework.op_callbacks",
        "tensorflow.python.eager.context",
        "tensorflow.python.eager.forwardprop_util",
        "tensorflow.python.eager.record",
        "tensorflow.python.framework.auto_control_deps_utils",
    }


def test_tensorflow_has_them():
    assert callable(op_callbacks.add_op_callback)
    assert callable(op_callbacks.remove_op_callback)
    tf.random.set_seed(1)
    assert callable(context.context()._rng.getstate)
    assert callable(context.context().clear_kernel_cache)
    assert callable(tf.__internal__.autograph.tf_convert)
    assert callable(tf.__internal__.autograph.control_status_ctx)


def test_tensorflow_tells_what_tapes_record():
    x = tf.constant(1.0)
    assert not record.could_possibly_record()
    with tf.GradientTape() as tape:
        assert record.could_possibly_record()
        assert not record.should_record_backprop([x])
        tape.watch(x)
        assert record.should_record_backprop([x])
        with record.stop_recording():
            y = 2 * x
    assert tape.gradient(y, x) is None
    with tf.autodiff.ForwardAccumulator(x, x):
        assert forwardprop_util.pack_tangents([x]).tangents
        assert not forwardprop_util.pack_tangents([tf.constant(1.0)]).tangents


def test_tensorflow_tells_which_variables_a_graph_only_reads():
    read, written = tf.Variable(1.0), tf.Variable(1.0)

    @tf.function
    def call(x):
        written.assign_add(x)
        return read * x

    graph = call.get_concrete_function(tf.constant(1.0)).graph
    found = auto_control_deps_utils.get_read_only_resource_input_indices_graph(graph)
    only_read = {id(graph.inputs[k]) for k in found}
    assert [id(outer) for outer, inner in graph.captures if id(inner) in only_read] == [
        id(read.handle)
    ]
