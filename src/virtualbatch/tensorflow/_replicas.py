"""Replicas of a `tf.distribute` strategy: what they sum, and a replica that has no rows.

A graph is traced in one thread per replica, and another thread runs wherever replicas wait for each
other. So shared state must not stay changed across a sum, and no sum may be in a loop or a branch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def replicas() -> int:
    """How many replicas train in step, this one included; 1 outside of `strategy.run`."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def replica() -> int:
    """The number of this replica, from 0; 0 outside of `strategy.run`."""
    if replicas() == 1:
        return 0
    return int(tf.get_static_value(_context().replica_id_in_sync_group))


def refuse_eager_replicas() -> None:
    """Refuses a call whose replicas would run one after another, each waiting for all.

    Raises:
        ValueError: this is one of several replicas, outside of a graph.
    """
    count = replicas()
    if count > 1 and tf.executing_eagerly():
        raise ValueError(
            "Several replicas must be trained in a graph. Got an eager call in a strategy of "
            f"{count} replicas. Put strategy.run into a tf.function."
        )


def refuse_values_of_replicas(batch: Any, variables: Any) -> None:
    """Refuses what only a replica can read, outside of `strategy.run`.

    Args:
        batch: nested structure of arrays.
        variables: nested structure of variables.

    Raises:
        ValueError: rows are those of several replicas, or variables those of a strategy in its
            scope, where TensorFlow has no gradients.
    """
    found = tf.nest.flatten(batch)
    if tf.distribute.in_cross_replica_context():
        # Keras' variables hold TensorFlow's there.
        found += [getattr(x, "_value", x) for x in tf.nest.flatten(variables)]
    if any(isinstance(leaf, tf.distribute.DistributedValues) for leaf in found):
        raise ValueError(
            "Each replica takes the gradients of its own rows. Got values of a strategy outside "
            "of strategy.run. Call it inside strategy.run."
        )


def refuse_on_replicas(rule: str, fix: str) -> None:
    """Refuses what is done for one device, while other replicas wait for this one.

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
    """Refuses to plan a replica; see `refuse_on_replicas`."""
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
        values: of a floating, complex or integer dtype, each of one shape on all replicas. They
            are summed in float64; integers exactly.

    Returns:
        The sums, in the dtypes and shapes of the values.
    """
    if not values:
        return []
    parts = [_as_floats(value) for value in values]
    flat = [tf.reshape(part, [-1]) for part in parts]
    # One vector: of several tensors a strategy may make several reductions.
    total = _context().all_reduce(tf.distribute.ReduceOp.SUM, tf.concat(flat, 0))
    pieces = tf.split(total, [tf.size(piece) for piece in flat])
    return [
        tf.ensure_shape(_from_floats(tf.reshape(piece, tf.shape(part)), value.dtype), value.shape)
        for piece, part, value in zip(pieces, parts, values, strict=True)
    ]


def summed_gradients(gradients: Sequence[Any]) -> list[Any]:
    """Gradients, each summed over all replicas, as the strategy packs them.

    Args:
        gradients: tensors, IndexedSlices or Nones, which are the same ones on all replicas.
    """
    given = [gradient for gradient in gradients if gradient is not None]
    found = iter(_context().all_reduce(tf.distribute.ReduceOp.SUM, given) if given else [])
    return [None if gradient is None else next(found) for gradient in gradients]


def with_a_row(structure: Any, rows: Any) -> Any:
    """A batch that can be cut: as it is, or one row of zeros where there are none.

    What is computed from that row must be dropped; see `unless_empty`.

    Args:
        structure: nested structure of tensors with one entry per row, and of Nones.
        rows: their number, an integer scalar.
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
    """What `run` gives, or zeros where there are no rows; then nothing of it runs.

    Args:
        rows: of this replica, an integer scalar.
        run: () -> nested structure of tensors and Nones.
        like: the same structure of specs, or of tensors of a trace, and of Nones. An axis of
            unknown length is empty where there are no rows.
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
    """One or two numbers of float64 for each entry, whose sums make the entry's."""
    if value.dtype.is_complex:
        return tf.cast(tf.stack([tf.math.real(value), tf.math.imag(value)]), tf.float64)
    if value.dtype.is_integer:
        wide = tf.cast(value, tf.int64)
        high = tf.bitwise.right_shift(wide, tf.constant(32, tf.int64))
        return tf.cast(tf.stack([high, wide - high * 2**32]), tf.float64)
    return tf.cast(value, tf.float64)[None]


def _from_floats(sums: Any, dtype: tf.DType) -> Any:
    """The entries of which `_as_floats` made these, along the first axis."""
    if dtype.is_complex:
        return tf.cast(tf.complex(sums[0], sums[1]), dtype)
    if dtype.is_integer:
        high, low = tf.cast(sums[0], tf.int64), tf.cast(sums[1], tf.int64)
        return tf.cast(high * 2**32 + low, dtype)
    return tf.cast(sums[0], dtype)


def _context() -> Any:
    return tf.distribute.get_replica_context()
