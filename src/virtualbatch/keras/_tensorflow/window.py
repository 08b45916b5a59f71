"""One batch of `fit` as micro-batches, on TensorFlow.

Each micro-batch adds its part of the loss, the gradients and the BatchNorm moments. Then optimizer,
trackers and moving averages are updated once.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import tree

from virtualbatch.keras._added_losses import AddedLosses, Shape
from virtualbatch.keras._batchnorm import (
    assign_statistics,
    merged,
    moving_statistics,
    recorded_moments,
)
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._not_finite import LOSSES, NO_PLACE
from virtualbatch.keras._overwritten import merged_gradients, updated
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._train_step import STATS
from virtualbatch.keras._window import WindowModel
from virtualbatch.noise.estimate import WindowStats
from virtualbatch.tensorflow._arrays import map_rows, specs
from virtualbatch.tensorflow._gradients import add, finished, split_sparse, widened
from virtualbatch.tensorflow._loop import Output, Traced, bound, fold, trace
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.tensorflow._stats import part_of, squared_norm
from virtualbatch.window.shares import accumulator_dtype
from virtualbatch.window.tree import rank

_TOTALS = tf.TensorSpec([None], tf.float64)


class Micro(NamedTuple):
    """The results of one micro-batch or of a whole window.

    Fields:
        losses: the loss and values of the per-output loss metrics. If statistics are needed, also
            this micro-batch's part of their `mean_square`, and 1, whose sum counts micro-batches.
        dense: dense gradients, or None.
        moments: BatchNorm moments, in the order of the layers' calls.
        latest: results of an overridden `compute_metrics`; else empty.
        sparse: values and indices of sparse gradients.
        told: a table for the logs, with one line per micro-batch; see `LOSSES`.
    """

    losses: list[Any]
    dense: list[Any]
    moments: list[Any]
    latest: Any
    sparse: list[Any]
    told: Any


def rows_of(batch: Any) -> Any:
    """Rows of a batch as an int32 scalar, read from its first array as Keras does.

    Raises:
        ValueError: the first leaf is not an array, or is a scalar.
    """
    leaf = next((leaf for leaf in tree.flatten(batch) if leaf is not None), None)
    if not hasattr(leaf, "shape") or rank(leaf) == 0:
        raise ValueError(
            "Every array of a batch must have rows on its first axis. "
            f"Got {type(leaf).__name__}. Pass arrays or tensors, as fit yields them."
        )
    if isinstance(leaf, tf.RaggedTensor):
        return leaf.nrows(tf.int32)
    return tf.shape(leaf)[0]


class WindowRun:
    """One batch of `fit` as micro-batches.

    Args:
        model: a compiled model.
        cut: the batch, cut.
        rows: rows of the whole batch.
        stretch: micro-batch -> its stretch, see `Rows`.
        added: what is known about the losses that layers add.
        stats: whether the logs get statistics of the window.
        in_order: whether micro-batches take the rows in the order of the batch.
        gathering: whose predictions are gathered, if any.
    """

    def __init__(
        self,
        model: keras.Model,
        cut: list[Segment],
        rows: Any,
        stretch: Callable[[Any], Any],
        added: AddedLosses,
        stats: bool,
        in_order: bool,
        gathering: Gathering | None = None,
    ):
        self._model = model
        self._with_stats = stats
        self._cut = cut
        self._stretch = stretch
        self._in_batch_order = in_order
        self._window = WindowModel(model, rows, added, gathering)
        # Known once the step is traced or has run eagerly.
        self._called: list[Any] = []
        self._start: dict[int, tuple[Any, Any]] = {}
        self._counted: Any = None

    @property
    def losses_of_one_number(self) -> list[str]:
        """Names of losses that gave a number rather than one value per row; known after `train`."""
        return self._window.losses_of_one_number

    def train(self) -> dict[str, Any]:
        """Runs the window and commits it: optimizer, trackers, moving averages."""
        model = self._model
        self._start = moving_statistics(self._window.batchnorm)
        if tf.executing_eagerly():
            traced = trace(self._cut, lambda index, batch: self._micro(batch, self._totals))
        else:
            step = trace(
                self._cut,
                lambda index, batch, totals: self._micro(batch, lambda: totals),
                model.jit_compile,
                (_TOTALS,),
            )
            # Only now is it known whether any weight has to be counted.
            totals = self._totals() if self._window.needs_count else tf.zeros([1], tf.float64)
            traced = [bound(entry, totals) for entry in step]
        losses, dense, moments, latest, sparse, told = self.sums_of(traced)
        noise: list[Any] = []
        if self._with_stats:
            *losses, mean_square, count = losses
            noise = [mean_square, count]
        stats = self._commit(losses, finished(dense, sparse, model.trainable_variables), noise)
        assign_statistics(self._called, self._start, moments)
        return self._window.results(latest) | stats | {LOSSES: told}

    def sums_of(self, traced: Sequence[Traced]) -> Micro:
        """The results of all micro-batches, merged."""
        sums, (*sparse, told) = fold(
            traced,
            lambda _, found: Output(
                (found.losses, found.dense, found.moments, found.latest),
                [*found.sparse, found.told],
            ),
            lambda a, b: (
                add(a[0], b[0]),
                merged_gradients(a[1], b[1], self._window.overwritten, tf.maximum),
                merged(a[2], b[2]),
                b[3],
            ),
        )
        losses, dense, moments, latest = sums
        return Micro(losses, dense, moments, latest, sparse, told)

    def _optimizer(self) -> Any:
        """The optimizer that gets the gradients of the window."""
        return self._model.optimizer

    def _micro(self, batch: Any, totals: Callable[[], Any]) -> Micro:
        """Forward and backward of one micro-batch."""
        window = self._window
        rows = Rows(rows_of(batch), window.rows, self._stretch(batch))
        with tf.GradientTape() as tape:
            with recorded_moments(window.batchnorm) as seen:
                y_pred = window.forward(batch[0])

            def unrecorded_totals() -> Any:
                with tape.stop_recording():
                    return totals()

            def unrecorded_shapes(few: int) -> Sequence[Shape]:
                with tape.stop_recording():
                    return self._added_shapes(batch[0], few)

            loss, tracked = window.loss(batch, y_pred, rows, unrecorded_totals, unrecorded_shapes)
            scaled = self._model.optimizer.scale_loss(loss)
        self._called = [layer for layer, _ in seen]
        found_gradients = self._wide_gradients(tape, scaled, rows)
        noise = []
        if self._with_stats:
            part = part_of(updated(found_gradients, window.overwritten), rows.share("float64"))
            noise = [part, tf.ones([], tf.int32)]
        dense, sparse = split_sparse(found_gradients)
        found = window.update_metrics(batch, y_pred, rows)
        latest = tree.map_structure(tf.convert_to_tensor, found)
        moments = [
            found._replace(weight=tf.cast(found.weight, found.mean.dtype)) for _, found in seen
        ]
        told = self._told(loss, rows)
        return Micro([loss, *tracked, *noise], dense, moments, latest, sparse, told)

    def _told(self, loss: Any, rows: Rows) -> Any:
        """The line of a micro-batch in the table for the logs; see `LOSSES`."""
        dtype = accumulator_dtype(loss.dtype.name)
        place = rows.here if self._in_batch_order else NO_PLACE
        return tf.stack([tf.cast(loss, dtype), tf.cast(place, dtype)])[None]

    def _wide_gradients(self, tape: Any, loss: Any, rows: Rows) -> list[Any]:
        """Gradients in the dtype of the buffer.

        The loss is this micro-batch's part of the window's loss. Half-precision gradients are
        computed for the micro-batch's own mean instead, and scaled in the wide dtype, where few
        bits are lost.
        """
        variables = self._model.trainable_variables
        if not any(is_half(variable) for variable in variables):
            return tape.gradient(loss, variables)
        if any(self._window.overwritten):
            # The backward pass of overwritten variables returns maxima for the window's loss. They
            # cannot be scaled later.
            return [widened(gradient, 1.0) for gradient in tape.gradient(loss, variables)]
        share = rows.share("float32")
        upstream = tf.ones_like(loss) / tf.cast(share, loss.dtype)
        gradients = tape.gradient(loss, variables, output_gradients=upstream)
        return [widened(gradient, share) for gradient in gradients]

    def _totals(self) -> Any:
        """The weights vector of the window, counted once by forwards of its own."""
        if self._counted is None:
            self._counted = self.counts_of(
                trace(self._cut, lambda index, batch: self._count(batch))
            )
        return self._counted

    def counts_of(self, traced: Sequence[Traced]) -> Any:
        """The weights vectors of all micro-batches, summed."""
        sums, _ = fold(traced, lambda _, counted: Output([counted], []), add)
        return sums[0]

    def _count(self, batch: Any) -> Any:
        rows = Rows(rows_of(batch), self._window.rows, self._stretch(batch))
        return tf.cast(self._window.counted(batch, rows), tf.float64)

    def _added_shapes(self, x: Any, few: int) -> Sequence[Shape]:
        """Shapes of the losses that layers add for `few` copies of the first row."""
        found: list[Shape] = []

        def forward(x: Any) -> None:
            found[:] = self._window.added_shapes(
                map_rows(lambda leaf: tf.gather(leaf, [0] * few), x)
            )

        if tf.executing_eagerly():
            forward(x)
        else:
            # In a graph of its own, which never runs.
            tf.function(forward, autograph=False).get_concrete_function(specs(x))
        return found

    def _commit(
        self, losses: list[Any], gradients: list[Any], noise: Sequence[Any]
    ) -> dict[str, Any]:
        """Updates trackers and optimizer. Returns the statistics as an entry of the logs."""
        stats: dict[str, Any] = {}
        model, (loss, *tracked) = self._model, losses
        # Counters depend on no gradient. Without this they would move even if a batch is refused.
        with tf.control_dependencies([loss]):
            self._window.track(loss, tracked)
            variables = model.trainable_variables
            if variables:
                if noise:
                    stats[STATS] = self._stats(updated(gradients, self._window.overwritten), *noise)
                self._optimizer().apply_gradients(zip(gradients, variables, strict=True))
            else:
                warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return stats

    def _stats(self, gradients: Sequence[Any], mean_square: Any, count: Any) -> WindowStats:
        """The statistics of a window, without the optimizer's loss scale, which changes."""
        square = tf.cast(squared_norm(gradients), mean_square.dtype)
        undo = tf.cast(self._model.optimizer.scale_loss(1.0), mean_square.dtype) ** -2
        return WindowStats(self._window.rows, count, mean_square * undo, square * undo)


def is_half(variable: Any) -> bool:
    """Whether the gradients of a variable are summed in a wider dtype."""
    return accumulator_dtype(variable.dtype) != variable.dtype
