"""Replicas of a `tf.distribute` strategy: sums over replicas, and replicas without rows.

A graph is traced in one thread per replica. Where replicas wait for each other, another thread goes
on. So shared state must not stay changed across a sum, and no sum may be in a loop or a branch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def replicas() -> int:
    """The number of replicas that train in step, including this one; 1 outside `strategy.run`."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def replica() -> int:
    """The number of this replica, from 0; 0 outside `strategy.run`."""
    if replicas() == 1:
        return 0
    return int(tf.get_static_value(_context().replica_id_in_sync_group))


def refuse_eager_replicas() -> None:
    """Refuses an eager call: replicas would run one after another, and each would wait for all.

    Raises:
        ValueError: this is one of several replicas, outside a graph.
    """
    count = replicas()
    if count > 1 and tf.executing_eagerly():
        raise ValueError(
            "Several replicas must be trained in a graph. Got an eager call in a strategy of "
            f"{count} replicas. Put strategy.run into a tf.function."
        )


def refuse_values_of_replicas(batch: Any, variables: Any) -> None:
    """Refuses, outside `strategy.run`, values that only a replica can read.

    Args:
        batch: nested structure of arrays.
        variables: nested structure of variables.

    Raises:
        ValueError: the batch holds rows of several replicas; or the call is in the scope of a
            strategy and with its variables, where TensorFlow has no gradients.
    """
    found = tf.nest.flatten(batch)
    if tf.distribute.in_cross_replica_context():
        # Variables of Keras hold the variable of TensorFlow as `_value`.
        found += [getattr(x, "_value", x) for x in tf.nest.flatten(variables)]
    if any(isinstance(leaf, tf.distribute.DistributedValues) for leaf in found):
        raise ValueError(
            "Each replica takes the gradients of its own rows. Got values of a strategy outside "
            "of strategy.run. Call it inside strategy.run."
        )


def refuse_on_replicas(rule: str, fix: str) -> None:
    """Refuses work that is done for one device, while other replicas wait for this one.

    Args:
        rule: a sentence.
        fix: a sentence.

    Raises:
        ValueError: this is one of several replicas.
    """
    count = replicas()
    if count > 1:
        raise ValueError(f"{rule} Got a strategy of {count} replicas. {fix}")


def refuse_planning_replicas() -> None:
    """Refuses to plan on one of several replicas."""
    refuse_on_replicas(
        'microbatch_size="auto" plans one device.',
        "Call plan outside of it, and pass what it finds.",
    )


def refuse_replicas_out_of_step() -> None:
    """Refuses a strategy whose replicas never wait for each other.

    Raises:
        ValueError: this is a replica of a ParameterServerStrategy.
    """
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
        raise ValueError(
            f"Replicas must train in step. Got {type(strategy).__name__}. "
            "Use MirroredStrategy or MultiWorkerMirroredStrategy."
        )


def summed(values: Sequence[Any]) -> list[Any]:
    """Tensors, each summed over all replicas, in one reduction.

    Args:
        values: tensors of a floating, complex or integer dtype. Each has the same shape on all
            replicas. They are summed in float64, and integers are summed exactly.

    Returns:
        The sums, in the dtypes and shapes of the values.
    """
    if not values:
        return []
    parts = [_as_floats(value) for value in values]
    flat = [tf.reshape(part, [-1]) for part in parts]
    # One vector, because a strategy may make several reductions of several tensors.
    total = _context().all_reduce(tf.distribute.ReduceOp.SUM, tf.concat(flat, 0))
    pieces = tf.split(total, [tf.size(piece) for piece in flat])
    return [
        tf.ensure_shape(_from_floats(tf.reshape(piece, tf.shape(part)), value.dtype), value.shape)
        for piece, part, value in zip(pieces, parts, values, strict=True)
    ]


def summed_gradients(gradients: Sequence[Any]) -> list[Any]:
    """Gradients, each summed over all replicas, as the strategy packs them.

    Args:
        gradients: tensors, IndexedSlices or Nones, of the same kinds on all replicas.
    """
    given = [gradient for gradient in gradients if gradient is not None]
    found = iter(_context().all_reduce(tf.distribute.ReduceOp.SUM, given) if given else [])
    return [None if gradient is None else next(found) for gradient in gradients]


def with_a_row(structure: Any, rows: Any) -> Any:
    """A batch that can be cut: the batch itself, or one row of zeros if it has no rows.

    Results that are computed from the row of zeros must be dropped: see `unless_empty`.

    Args:
        structure: nested structure of tensors with one entry per row, and of Nones.
        rows: the number of rows, an integer scalar.
    """
    leaves = tf.nest.flatten(structure)
    tensors = [leaf for leaf in leaves if leaf is not None]

    def filler() -> list[Any]:
        return [tf.zeros(tf.concat([[1], tf.shape(leaf)[1:]], 0), leaf.dtype) for leaf in tensors]

    found = tf.cond(rows > 0, lambda: [tf.identity(leaf) for leaf in tensors], filler)
    for leaf, tensor in zip(tensors, found, strict=True):
        tensor.set_shape([None, *leaf.shape[1:]])
    filled = iter(found)
    return tf.nest.pack_sequence_as(
        structure, [leaf if leaf is None else next(filled) for leaf in leaves]
    )


def unless_empty(rows: Any, run: Callable[[], Any], like: Any) -> Any:
    """The result of `run`; or zeros if there are no rows, and then `run` does not run.

    Args:
        rows: the rows of this replica, an integer scalar.
        run: () -> nested structure of tensors and Nones.
        like: the structure of the result, with specs or traced tensors, and Nones. In the zeros, an
            axis of unknown length has the length 0.
    """
    specs = tf.nest.flatten(like)

    def nothing() -> list[Any]:
        return [
            tf.zeros([0 if length is None else length for length in spec.shape], spec.dtype)
            for spec in specs
            if spec is not None
        ]

    def window() -> list[Any]:
        return [leaf for leaf in tf.nest.flatten(run()) if leaf is not None]

    found = iter(tf.cond(rows > 0, window, nothing))
    return tf.nest.pack_sequence_as(like, [None if spec is None else next(found) for spec in specs])


def _as_floats(value: Any) -> Any:
    """One or two float64 numbers for each entry. Their sums give the sum of the entries."""
    if value.dtype.is_complex:
        return tf.cast(tf.stack([tf.math.real(value), tf.math.imag(value)]), tf.float64)
    if value.dtype.is_integer:
        wide = tf.cast(value, tf.int64)
        high = tf.bitwise.right_shift(wide, tf.constant(32, tf.int64))
        return tf.cast(tf.stack([high, wide - high * 2**32]), tf.float64)
    return tf.cast(value, tf.float64)[None]


def _from_floats(sums: Any, dtype: tf.DType) -> Any:
    """The inverse of `_as_floats`, which put the numbers of an entry along the first axis."""
    if dtype.is_complex:
        return tf.cast(tf.complex(sums[0], sums[1]), dtype)
    if dtype.is_integer:
        high, low = tf.cast(sums[0], tf.int64), tf.cast(sums[1], tf.int64)
        return tf.cast(high * 2**32 + low, dtype)
    return tf.cast(sums[0], dtype)


def _context() -> Any:
    return tf.distribute.get_replica_context()
