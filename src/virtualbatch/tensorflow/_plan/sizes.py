"""What a plan for a batch depends on, and a batch of zeros for planning during a trace."""

from functools import cache
from typing import Any

import tensorflow as tf

from virtualbatch.plan.signature import Leaf, Signature
from virtualbatch.tensorflow._arrays import is_array, named_arrays
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.fingerprint import fingerprint
from virtualbatch.window.tree import common_rows


def signature(program: Program, batch: Any) -> Signature:
    """What a plan for a batch depends on.

    Args:
        program: the loss, its weight and its variables.
        batch: a batch of known shapes, not a Window.

    Raises:
        ValueError: a shape is not known yet, or an array is ragged, inside a graph.
    """
    arrays = named_arrays(batch)
    rows = common_rows(arrays)
    graph = not tf.executing_eagerly()
    for place, array in arrays:
        is_ragged = isinstance(array, tf.RaggedTensor)
        if graph and (is_ragged or not tf.TensorShape(array.shape).is_fully_defined()):
            got = "a ragged array" if is_ragged else f"shape {array.shape}"
            raise ValueError(
                'microbatch_size="auto" needs fully known shapes while a graph is traced. Got '
                f"{got} in {place}. Call plan on a batch beforehand, and pass what it finds."
            )
    if rows is None:
        raise ValueError("internal: a batch has no number of rows.")
    kinds = ", ".join(
        f"{tf.as_dtype(found.dtype).name}{found.shape.as_list()}"
        for found in tf.nest.flatten(program.variables)
    )
    return Signature(
        f"tensorflow {tf.__version__} on {_device()}, variables {kinds}",
        fingerprint(program.loss_fn, program.weight, program.has_aux),
        rows,
        tuple(
            Leaf(place, _row_shape(array), tf.as_dtype(array.dtype).name) for place, array in arrays
        ),
    )


def stand_in(batch: Any) -> Any:
    """A batch of zeros with the shapes of a traced batch. Call it outside the graph."""

    def zeros(leaf: Any) -> Any:
        return tf.zeros(leaf.shape, leaf.dtype) if is_array(leaf) else leaf

    return tf.nest.map_structure(zeros, batch)


@cache
def _device() -> str:
    if not tf.config.list_logical_devices("GPU"):
        return "CPU"
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    return f"GPU, {details.get('device_name')}"


def _row_shape(array: Any) -> tuple[int, ...]:
    # Rows of a ragged tensor have no common length, so the number of its values stands in.
    if isinstance(array, tf.RaggedTensor):
        return (int(array.flat_values.shape[0]), *array.flat_values.shape[1:])
    return tuple(array.shape[1:])
