"""Keras on TensorFlow: a `train_step` that runs one batch as a window.

The batch is checked and cut, missing variables are created outside the graph, and the window runs.
The train function around it keeps XLA inside the loop over micro-batches.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.eager_program import EagerProgram
from virtualbatch.keras._checks import replica_count
from virtualbatch.keras._gather.detection import evaluated_eagerly
from virtualbatch.keras._gather.gathering import Found, Gathering
from virtualbatch.keras._not_finite import LossesOfFit, without_losses
from virtualbatch.keras._tensorflow.building import (
    build,
    build_layers,
    build_optimizer,
    created_outside,
)
from virtualbatch.keras._tensorflow.cut import Cut
from virtualbatch.keras._tensorflow.device_train_function import make_device_train_function
from virtualbatch.keras._tensorflow.distributed_data import build_from_a_first_batch
from virtualbatch.keras._tensorflow.gathered_replicas import GatheredReplicaRun
from virtualbatch.keras._tensorflow.gathered_window import GatheredRun
from virtualbatch.keras._tensorflow.packing import PackedCut
from virtualbatch.keras._tensorflow.plan import planned
from virtualbatch.keras._tensorflow.replica_checks import refuse_replicas
from virtualbatch.keras._tensorflow.replica_train_function import make_replica_train_function
from virtualbatch.keras._tensorflow.replicas import ReplicaRun, known_to_all
from virtualbatch.keras._tensorflow.window import WindowRun, rows_of
from virtualbatch.keras._train_step import TrainStep
from virtualbatch.plan.plan import Plan
from virtualbatch.tensorflow._arrays import after, is_array
from virtualbatch.tensorflow._certify.eager_random import EagerRandom
from virtualbatch.tensorflow._replicas import with_a_row
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.window.cut import sizes_disagree

_MANY = sys.maxsize


class TensorFlowStep(TrainStep):
    """The `train_step` of a model that accumulates on TensorFlow."""

    _layers_built = False

    def __call__(self, data: Any) -> dict[str, Any]:
        """Trains on one batch, as Keras' `train_step` does."""
        return without_losses(self.with_losses(data))

    def with_losses(self, data: Any) -> dict[str, Any]:
        """Trains on one batch. The logs also hold the losses of micro-batches."""
        model = self._model
        batch = self._unpacked(data)
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            return self._on_a_replica(batch)
        with tf.variable_creator_scope(created_outside):
            packing = self._packing_in_force()
            cut: Cut | PackedCut
            if packing is None:
                batch = self._with_agreeing_sizes(
                    batch, rows_of(batch), self._model._loss_tracker.count
                )
                cut = Cut(batch, *self._cut_by())
            else:
                cut = PackedCut(model, batch, packing)
            microbatches = cut.segments()
            if not self._layers_built:
                build_layers(model, microbatches[0].get(0)[0])
                self._layers_built = True
            build_optimizer(model)
            rows, stats = rows_of(batch), self.listener is not None
            gathering = None if _is_one(microbatches) else self._gathering_of(batch, rows)
            if gathering is None:
                in_order = packing is None
                window = WindowRun(
                    model, microbatches, rows, cut.stretch, self._added, stats, in_order
                )
            else:
                window = GatheredRun(model, batch, cut, rows, self._added, gathering)
            results = window.train()
            self._say(window.losses_of_one_number)
        return results

    def _on_a_replica(self, batch: Any) -> dict[str, Any]:
        """Trains on one replica's rows; there may be none."""
        model = self._model
        refuse_replicas(model)
        gathering = self.gathering(batch)
        rows = rows_of(batch)
        batch = with_a_row(_of_equal_rows(batch), rows)
        everywhere, seen = known_to_all(rows, model._loss_tracker.count)
        packing = self._packing_in_force()
        cut: Cut | PackedCut
        if packing is None:
            batch = self._with_agreeing_sizes(batch, tf.reduce_max(everywhere), seen)
            cut = Cut(batch, *self._cut_by())
        else:
            cut = PackedCut(model, batch, packing, rows)
        window: WindowRun
        if gathering is None:
            window = ReplicaRun(
                model,
                cut.segments(),
                rows,
                tf.reduce_sum(everywhere),
                cut.stretch,
                self._added,
                self.listener is not None,
            )
        else:
            window = GatheredReplicaRun(model, batch, cut, everywhere, self._added, gathering)
        results = window.train()
        self._say(window.losses_of_one_number)
        return results

    def _losses(self) -> LossesOfFit:
        # Reading a value from another device stops that device, unless a later window keeps it
        # busy. Values on the CPU can be read at any time.
        return LossesOfFit(
            lambda losses, is_latest: (
                not is_latest or all("CPU" in x.device for x in tf.nest.flatten(losses))
            )
        )

    def next_to_try(self) -> str:
        """The size to try next after memory ran out, in words."""
        size, steps = self._asked()
        if size is None:
            return f"accumulation_steps={2 * (steps or 1)} or more"
        return f"microbatch_size={max(size // 2, 1)} or less"

    def _gathering_of(self, batch: Any, rows: Any) -> Gathering | None:
        if tf.executing_eagerly():
            self.look_for_coupled(batch, int(rows), evaluated_eagerly)
        return self.gathering(batch)

    def _cut_by(self) -> tuple[int | None, int | None]:
        """(microbatch_size, accumulation_steps): the size to cut by, and None for the other."""
        size, steps = self._asked()
        if self.most is None and size is None and steps is not None:
            return None, steps
        # The rows may not be known here, so pass a number that no batch exceeds.
        return self._in_force(_MANY, size), None

    def _with_agreeing_sizes(self, batch: Any, rows: Any, seen: Any) -> Any:
        """The batch. Reading it in a graph fails unless both sizes agree for it.

        A short batch may be the last one of its epoch. It cannot be if it is the first one: then
        the loss tracker has counted nothing.

        Args:
            batch: the batch.
            rows: its rows on the device that has most of them.
            seen: the count of the loss tracker.
        """
        size, steps = self._asked()
        if size is None or steps is None:
            return batch
        count = (rows + size - 1) // size
        first = tf.equal(seen, 0)
        agree = tf.logical_or(
            tf.equal(count, steps), tf.logical_and(count < steps, tf.logical_not(first))
        )
        if tf.executing_eagerly():
            if not agree:
                raise ValueError(sizes_disagree(int(rows), size, steps))
            return batch
        before, after = sizes_disagree("ROWS", size, steps).split("ROWS")
        check = tf.debugging.Assert(agree, [before, rows, after])
        with tf.control_dependencies([check]):
            return tf.nest.map_structure(
                lambda leaf: tf.identity(leaf) if is_array(leaf) else leaf, batch
            )


def _of_equal_rows(batch: Any) -> Any:
    """The batch. Reading it fails unless all arrays have the same number of rows, perhaps 0."""
    counts = tf.stack([tf.shape(x)[0] for x in tf.nest.flatten(batch) if x is not None])
    check = tf.debugging.Assert(
        tf.reduce_all(tf.equal(counts, counts[0])),
        ["All arrays of a batch must have the same number of rows. Got rows", counts],
    )
    return after([check], batch)


def _is_one(cut: Sequence[Segment]) -> bool:
    """Whether a batch is known to be one micro-batch."""
    return len(cut) == 1 and isinstance(cut[0].count, int) and cut[0].count == 1


def make_train_function(model: keras.Model) -> Callable[..., Any]:
    """A `make_train_function` for one device, or for all replicas of a strategy."""
    if replica_count(model) == 1:
        return make_device_train_function(model, BACKEND)
    model._maybe_symbolic_build = build_from_a_first_batch(model)
    return make_replica_train_function(model, BACKEND)


def plan(model: keras.Model, batch: Any, memory_limit: int | str | None, found: Found) -> Plan:
    """The plan for a batch, for a model that need not accumulate; see `virtualbatch.keras.plan`."""
    return planned(partial(_step_of, model, found), model, batch, memory_limit)


def _sizes(rows: int, size: int) -> list[int]:
    """Rows of each micro-batch: all of one size, and a remainder."""
    return [min(size, rows - start) for start in range(0, rows, size)]


def _step_of(model: keras.Model, found: Found, size: int) -> Callable[[Any], Any]:
    """The step of a model with micro-batches of `size` rows."""
    return TensorFlowStep(model, size, None, gather=found)


BACKEND = Backend(
    refuse=refuse_replicas,
    step=TensorFlowStep,
    make_train_function=make_train_function,
    plan=plan,
    build=build,
    program=EagerProgram,
    cut=_sizes,
    is_concrete=lambda value: hasattr(value, "numpy"),
    kept=lambda model: [EagerRandom()],
    evaluate=evaluated_eagerly,
)
