"""Loss functions that only TensorFlow's user can write. Frames of this file are the user's."""

from typing import Any

import tensorflow as tf
from tests.fuzz.call import Call

import virtualbatch.tensorflow as vb


def _scalar(result: Any) -> Any:
    """The loss without aux, of terms their sum."""
    result = result[0] if type(result) is tuple else result
    return sum(result.values()) if isinstance(result, dict) else result


def _window(call: Call, before: Any, batch: Any) -> Any:
    found = vb.value_and_gradients(
        lambda given: _scalar(before(given)), batch, call.weights, microbatch_size=1
    )
    return found[0]


def _assigns(call: Call, before: Any, batch: Any) -> Any:
    result = before(batch)
    call.weights[0].assign_add(tf.ones_like(call.weights[0]))
    return result


def _own_tape(call: Call, before: Any, batch: Any) -> Any:
    with tf.GradientTape() as tape:
        result = _scalar(before(batch))
    return result + tf.reduce_sum(tape.gradient(result, call.weights[0]))


# name -> (call, the loss function before, micro-batch) -> what it returns instead.
LOSSES: dict[str, Any] = {
    "a window in the window": _window,
    "assigns a variable": _assigns,
    "a tape of its own": _own_tape,
    "ragged": lambda call, before, batch: tf.ragged.constant([[1.0], []]),
    "sparse": lambda call, before, batch: tf.sparse.from_dense([_scalar(before(batch))]),
    "a float": lambda call, before, batch: float(_scalar(before(batch))),
    "a variable": lambda call, before, batch: tf.Variable(1.0, dtype=tf.float64),
    "stopped": lambda call, before, batch: tf.stop_gradient(_scalar(before(batch))),
    "text": lambda call, before, batch: tf.constant("loss"),
}
