"""One batch of `fit` as micro-batches on several replicas of a `tf.distribute` strategy.

Before its first micro-batch, each replica knows the rows and weights of all replicas. So its sums
are parts of the whole batch's sums. They are summed over replicas once, after the loop, and the
optimizer gets the result.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._added_losses import AddedLosses, Shape
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._tensorflow.one_replica import told_of_one_replica
from virtualbatch.keras._tensorflow.window import Micro, WindowRun
from virtualbatch.keras._terms import shallow_copy
from virtualbatch.keras._window import WindowModel
from virtualbatch.tensorflow._loop import Traced
from virtualbatch.tensorflow._replicas import replica, summed, summed_gradients, unless_empty
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.window.shares import Moments


def known_to_all(rows: Any, seen: Any) -> tuple[Any, Any]:
    """Numbers that all replicas need before their first micro-batch, in one reduction.

    Args:
        rows: rows of this replica, an int32 scalar.
        seen: the count of this replica's loss tracker.

    Returns:
        (rows of each replica, an int32 vector; the sum of all replicas' counts).
    """
    context = tf.distribute.get_replica_context()
    place = tf.one_hot(
        context.replica_id_in_sync_group, context.num_replicas_in_sync, dtype=tf.int32
    )
    everywhere, counted = summed([place * rows, tf.convert_to_tensor(seen)])
    return everywhere, counted


class ReplicaRun(WindowRun):
    """One replica's part of a batch.

    Args:
        model: a compiled model.
        cut: this replica's rows, cut; one filler row if it has none.
        here: the number of its rows, an int32 scalar that may be 0.
        rows: rows of the whole batch, an int32 scalar.
        stretch: see `WindowRun`.
        added: what is known about the losses that layers add.
        stats: whether the logs get statistics of the window.
    """

    def __init__(
        self,
        model: keras.Model,
        cut: list[Segment],
        here: Any,
        rows: Any,
        stretch: Callable[[Any], Any],
        added: AddedLosses,
        stats: bool,
    ):
        super().__init__(model, cut, rows, stretch, added, stats, in_order=False)
        self._window = ReplicaModel(model, rows, added, here)
        self._here = here

    def _optimizer(self) -> Any:
        return without_a_sum(self._model.optimizer)

    def counts_of(self, traced: Sequence[Traced]) -> Any:
        count = partial(super().counts_of, traced)
        local = unless_empty(self._here, count, traced[0].outputs)
        return summed([local])[0]

    def sums_of(self, traced: Sequence[Traced]) -> Micro:
        run = partial(super().sums_of, traced)
        found = unless_empty(self._here, run, self._like(traced))
        told = told_of_this_replica(found.told)
        sums, moments = summed_with_moments(
            [*found.losses, told],
            found.moments,
            [self._start[id(layer)][0] for layer in self._called],
        )
        dense, sparse = summed_window_gradients(
            found.dense, found.sparse, self._model.trainable_variables
        )
        return Micro(sums[:-1], dense, moments, found.latest, sparse, sums[-1])

    def _like(self, traced: Sequence[Traced]) -> Any:
        """Specs of the window's results."""
        micro = traced[0].outputs
        dense, sparse = gradient_specs(micro.dense, micro.sparse, self._model.trainable_variables)
        return micro._replace(dense=dense, sparse=sparse)


def told_of_this_replica(told: Any) -> Any:
    """A table of all replicas for the logs, with only this replica's row filled.

    Args:
        told: a matrix with one row for each of its micro-batches; see `LOSSES`.

    Returns:
        A matrix that is summed over replicas. A row holds the replica's loss, its number of
        micro-batches, and the number of the first micro-batch whose loss is not finite: from 1 on,
        0 if there is none.
    """
    context = tf.distribute.get_replica_context()
    losses = told[:, 0]
    bad = tf.logical_not(tf.math.is_finite(losses))
    first = tf.where(tf.reduce_any(bad), tf.argmax(bad, output_type=tf.int32) + 1, 0)
    row = [tf.reduce_sum(losses), *(tf.cast(n, told.dtype) for n in (tf.size(losses), first))]
    numbers = tf.range(context.num_replicas_in_sync)[:, None]
    mine = tf.equal(numbers, context.replica_id_in_sync_group)
    return tf.where(mine, tf.stack(row)[None], tf.zeros([], told.dtype))


def gradient_specs(
    dense: Sequence[Any], sparse: Sequence[Any], variables: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Specs of a window's dense and sparse gradients, because a trace leaves shapes open."""
    return [
        None if gradient is None else tf.TensorSpec(variable.shape, gradient.dtype)
        for gradient, variable in zip(dense, variables, strict=True)
    ], [open_rows(rows) for rows in sparse]


def open_rows(rows: Any) -> Any:
    """The spec of an array with any number of such rows; None for None."""
    return None if rows is None else tf.TensorSpec([None, *rows.shape[1:]], rows.dtype)


def summed_window_gradients(
    dense: Sequence[Any], sparse: Sequence[Any], variables: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Sums gradients over all replicas in the dtype of the buffer, in one reduction."""
    slices = [
        None if values is None else tf.IndexedSlices(values, indices, tf.shape(variable))
        for values, indices, variable in zip(sparse[::2], sparse[1::2], variables, strict=True)
    ]
    found = summed_gradients([*dense, *slices])
    count = len(variables)
    rows: list[Any] = []
    for gradient in found[count:]:
        rows += [None, None] if gradient is None else [gradient.values, gradient.indices]
    return found[:count], rows


def summed_with_moments(
    values: Sequence[Any], moments: Sequence[Moments], means: Sequence[Any]
) -> tuple[list[Any], list[Moments]]:
    """Sums values and merges BatchNorm moments over all replicas, in one reduction.

    Args:
        values: the values of this replica.
        moments: the moments of this replica.
        means: for each of the moments, a mean that all replicas share.
    """
    centres = [tf.cast(mean, tf.float64) for mean in means]
    powers = [
        power
        for found, centre in zip(moments, centres, strict=True)
        for power in _powers(found, centre)
    ]
    sums = summed([*values, *powers])
    count = len(values)
    return sums[:count], [
        _moments(sums[count + 3 * k : count + 3 * k + 3], centre)
        for k, centre in enumerate(centres)
    ]


class ReplicaModel(WindowModel):
    """See `WindowModel`.

    Args:
        model: see `WindowModel`.
        rows: see `WindowModel`.
        added: see `WindowModel`.
        here: rows of this replica.
        gathering: see `WindowModel`.
    """

    def __init__(
        self,
        model: keras.Model,
        rows: Any,
        added: AddedLosses,
        here: Any,
        gathering: Gathering | None = None,
    ):
        super().__init__(model, rows, added, gathering)
        self._here = here

    @property
    def tracked_rows(self) -> Any:
        """See `WindowModel`. Only this replica's rows, because reading sums trackers of all."""
        return self._here

    def loss(
        self,
        batch: Any,
        y_pred: Any,
        rows: Rows,
        totals: Callable[[], Any],
        added_shapes: Callable[[int], Sequence[Shape]],
    ) -> tuple[Any, list[Any]]:
        """See `WindowModel`."""
        with told_of_one_replica():
            return super().loss(batch, y_pred, rows, totals, added_shapes)

    def added(self, rows: Rows, added_shapes: Callable[[int], Sequence[Shape]]) -> list[Any]:
        """See `WindowModel`."""
        with told_of_one_replica():
            return super().added(rows, added_shapes)

    def loss_of_all_rows(
        self, batch: Any, y_pred: Any, added: Sequence[Any]
    ) -> tuple[Any, list[Any]]:
        """See `WindowModel`."""
        with told_of_one_replica():
            return super().loss_of_all_rows(batch, y_pred, added)

    def cut_loss(
        self, batch: Any, y_pred: Any, rows: Rows, totals: Callable[[], Any]
    ) -> tuple[Any, list[Any]]:
        """See `WindowModel`."""
        with told_of_one_replica():
            return super().cut_loss(batch, y_pred, rows, totals)

    def update_metrics_of_all_rows(self, batch: Any, y_pred: Any) -> dict[str, Any]:
        """See `WindowModel`. Metrics are summed over replicas, so only the first one updates."""
        with nullcontext() if replica() == 0 else keras.StatelessScope():
            return super().update_metrics_of_all_rows(batch, y_pred)


def without_a_sum(optimizer: Any) -> Any:
    """A copy of an optimizer that does not sum gradients over replicas, but has the same variables.

    The gradients are summed already. Keras would clip each replica's gradient and then sum. Nothing
    may be set on the optimizer itself, because replicas share it and take turns inside of it. The
    copy belongs to one replica's trace.
    """
    twin = shallow_copy(optimizer)
    if hasattr(optimizer, "inner_optimizer"):
        vars(twin)["inner_optimizer"] = without_a_sum(optimizer.inner_optimizer)
    else:
        vars(twin)["_all_reduce_sum_gradients"] = list
    return twin


def _powers(moments: Moments, centre: Any) -> list[Any]:
    """The weight, and weighted sums of the difference from a centre and of its square, in float64.

    They can be summed over replicas. A centre that all replicas share keeps cancellation small.
    """
    weight, mean, variance = (tf.cast(part, tf.float64) for part in moments)
    off = mean - centre
    return [weight, weight * off, weight * (variance + off * off)]


def _moments(powers: Sequence[Any], centre: Any) -> Moments:
    """Moments from summed powers. If the weight is 0, the mean is 0."""
    weight, first, second = powers
    off = tf.math.divide_no_nan(first, weight)
    mean = tf.where(tf.equal(weight, 0), tf.zeros_like(centre), centre + off)
    return Moments(weight, mean, tf.math.divide_no_nan(second, weight) - off * off)
