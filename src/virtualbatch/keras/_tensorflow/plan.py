"""Plans for Keras on TensorFlow: runs and measures whole updates, and undoes each."""

import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._snapshot import Snapshot
from virtualbatch.keras._tensorflow.xla import compared
from virtualbatch.plan import planner
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.planner import bytes_allowed
from virtualbatch.plan.retry import Memory
from virtualbatch.tensorflow._plan.memory import ERRORS, left_bytes
from virtualbatch.tensorflow._plan.peak import PeakMemory, Watched
from virtualbatch.window.tree import array_leaves, common_rows

MEMORY = Memory(ERRORS, left_bytes)


def planned(
    step: Callable[[int], Callable[[Any], Any]],
    model: keras.Model,
    batch: Any,
    memory_limit: int | str | None,
) -> Plan:
    """The plan for a batch.

    Args:
        step: microbatch_size -> train step, a function of a batch.
        model: a model that is built and compiled, its optimizer too.
        batch: the batch as the step takes it.
        memory_limit: bytes, a text, or None.
    """
    batch = tf.nest.map_structure(
        lambda x: tf.convert_to_tensor(x) if hasattr(x, "shape") else x, batch
    )
    rows = common_rows(array_leaves(batch))
    if rows is None:
        raise ValueError("internal: a batch has no number of rows.")
    snapshot = Snapshot(model)
    held = snapshot.nbytes() + sum(
        array.shape.num_elements() * array.dtype.size for _, array in array_leaves(batch)
    )
    # Run one update first. Then what TensorFlow loads once, and what its allocator keeps, is not
    # counted as memory of an update.
    _Update(step(1), batch, snapshot)()
    peak = PeakMemory()
    plan = planner.planned(
        lambda size: Watched(_Update(step(size), batch, snapshot), peak),
        rows,
        held,
        bytes_allowed(memory_limit, held, MEMORY),
        ERRORS,
        remainder=False,
    )
    return compared(model, plan, lambda: _Update(step(plan.microbatch_size), batch, snapshot))


class _Update:
    """An update with one micro-batch size, in a graph."""

    def __init__(self, step: Callable[[Any], Any], batch: Any, snapshot: Snapshot):
        self._step = tf.function(step, autograph=False)
        self._batch = batch
        self._snapshot = snapshot

    def __call__(self) -> float:
        """Runs an update and undoes it.

        Returns:
            The seconds that the update took.
        """
        start = time.perf_counter()
        try:
            tf.nest.map_structure(float, self._step(self._batch))
            return time.perf_counter() - start
        finally:
            self._snapshot.restore()
