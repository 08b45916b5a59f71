"""Shows Keras one replica while some of its code runs.

Keras divides every mean by the number of replicas, because it treats a batch as a mean over
replicas. The shares of a window already sum to 1 over all replicas, so its losses must run as on
one device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

# TensorFlow has no public way to change this for the length of one call.
from tensorflow.python.distribute import distribute_lib


@contextmanager
def told_of_one_replica() -> Iterator[None]:
    """Runs losses on one of several replicas so that `get_strategy` shows one.

    This changes only the graph that is being traced, which belongs to this replica alone. Variables
    can be read inside but not written, because a write needs the strategy itself.

    Raises:
        ValueError: the loss writes a variable.
    """
    told = _OneReplica(tf.distribute.get_strategy())
    try:
        with _in_mode(distribute_lib._ThreadMode(told, None, tf.distribute.get_replica_context())):
            yield
    except RuntimeError as error:
        if not str(error).startswith("Mixing different tf.distribute.Strategy objects"):
            raise
        raise ValueError(
            "On several replicas a loss must not write variables. "
            "Got a write, such as that of a metric's update_state, in compute_loss or in a loss. "
            "Update metrics in compute_metrics."
        ) from error


@contextmanager
def outside_of_scopes() -> Iterator[None]:
    """Runs eager code as if outside of every strategy's scope, on the first replica's device."""
    with _in_mode(distribute_lib._get_default_replica_mode()):
        yield


class _OneReplica:
    """A strategy that reports one replica, and is the given strategy in all else.

    Args:
        strategy: the strategy.
    """

    num_replicas_in_sync = 1

    def __init__(self, strategy: Any):
        self._strategy = strategy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)


@contextmanager
def _in_mode(mode: Any) -> Iterator[None]:
    distribute_lib._push_per_thread_mode(mode)
    try:
        yield
    finally:
        distribute_lib._pop_per_thread_mode()
