"""One batch of `fit` as micro-batches, on TensorFlow.

Each micro-batch adds its part of the loss, of the gradients and of the BatchNorm moments; then the
optimizer, the trackers and the moving averages move once.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import tree

from virtualbatch.keras._batchnorm import (
    assign_statistics,
    batchnorm_layers,
    merged,
    moving_statistics,
    recorded_moments,
)
from virtualbatch.keras._terms import Contribution, Rows, contribution
from virtualbatch.tensorflow._batch import Segment
from virtualbatch.tensorflow._gradients import add, finished, split_sparse, widened
from virtualbatch.tensorflow._loop import Output, bound, fold, trace
from virtualbatch.window import accumulator_dtype

_TOTALS = tf.TensorSpec([None], tf.float64)


class _Micro(NamedTuple):
    """What one micro-batch gives.

    Fields:
        added: the loss, values of the per-output loss metrics and dense gradients.
        moments: BatchNorm moments, in the order of the layers' calls.
        latest: results of an overridden `compute_metrics`; else empty.
        sparse: values and indices of sparse gradients.
    """

    added: list[Any]
    moments: list[Any]
    latest: Any
    sparse: list[Any]


def rows_of(batch: Any) -> Any:
    """Rows of a batch as an int32 scalar, read from its first array as Keras does."""
    leaf = next(leaf for leaf in tree.flatten(batch) if leaf is not None)
    if isinstance(leaf, tf.RaggedTensor):
        return leaf.nrows(tf.int32)
    return tf.shape(leaf)[0]


class WindowRun:
    """One batch of `fit` as micro-batches."""

    def __init__(self, model: keras.Model, cut: list[Segment], rows: Any):
        self._model = model
        self._cut = cut
        self._rows = rows
        self._batchnorm = batchnorm_layers(model)
        self._own_loss = type(model).compute_loss is not keras.Model.compute_loss
        self._own_metrics = type(model).compute_metrics is not keras.Model.compute_metrics
        # Known once the step is traced, or eagerly run.
        self._called: list[Any] = []
        self._found: Contribution | None = None
        self._counted: Any = None

    def train(self) -> dict[str, Any]:
        """Runs the window and commits it: optimizer, trackers, moving averages."""
        model = self._model
        start = moving_statistics(self._batchnorm)
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
            totals = self._totals() if self._needs_count() else tf.zeros([1], tf.float64)
            traced = [bound(entry, totals) for entry in step]
        sums, sparse = fold(
            traced,
            lambda _, found: Output((found.added, found.moments, found.latest), found.sparse),
            lambda a, b: (add(a[0], b[0]), merged(a[1], b[1]), b[2]),
        )
        added, moments, latest = sums
        self._commit(added, sparse)
        assign_statistics(self._called, start, moments)
        results = model.get_metrics_result()
        if not self._own_metrics:
            return results
        return {name: results.get(name, value) for name, value in latest.items()}

    def losses_of_one_number(self) -> list[str]:
        """Names of losses that gave a number rather than one value per row; known after `train`."""
        return [] if self._found is None else self._found.numbers

    def _micro(self, batch: Any, totals: Callable[[], Any]) -> _Micro:
        """Forward and backward of one micro-batch."""
        model = self._model
        x, y, sample_weight = batch
        rows = Rows(rows_of(batch), self._rows)
        with tf.GradientTape() as tape:
            with recorded_moments(self._batchnorm) as seen:
                y_pred = self._forward(x)

            def unrecorded_totals() -> Any:
                with tape.stop_recording():
                    return totals()

            loss, tracked = self._loss(x, y, y_pred, sample_weight, rows, unrecorded_totals)
            scaled = model.optimizer.scale_loss(loss)
        self._called = [layer for layer, _ in seen]
        gradients, sparse = split_sparse(
            _wide_gradients(tape, scaled, model.trainable_variables, rows)
        )
        results = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        latest = tree.map_structure(tf.convert_to_tensor, results) if self._own_metrics else {}
        moments = [moments for _, moments in seen]
        return _Micro([loss, *tracked, *gradients], moments, latest, sparse)

    def _forward(self, x: Any) -> Any:
        model = self._model
        return model(x, training=True) if model._call_has_training_arg else model(x)

    def _loss(
        self,
        x: Any,
        y: Any,
        y_pred: Any,
        sample_weight: Any,
        rows: Rows,
        totals: Callable[[], Any],
    ) -> tuple[Any, list[Any]]:
        """This micro-batch's part of the window's loss and of its per-output losses."""
        model = self._model
        if self._own_loss:
            loss = model._compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
            return loss * rows.share(loss.dtype), []
        # Read first: counting runs the model again, which forgets what layers have added.
        # Terms of weights alone need no other treatment, because the shares sum to 1.
        parts = [model._aggregate_additional_loss(loss) for loss in model.losses]
        parts = [part * rows.share(part.dtype) for part in parts]
        tracked: list[Any] = []
        if model._compile_loss is not None:
            found = contribution(model._compile_loss, y, y_pred, sample_weight, rows, totals)
            self._found, tracked = found, found.tracked
            parts = [part for part in (found.total, *parts) if part is not None]
        if not parts:
            raise ValueError("No loss to compute. Provide a `loss` argument in `compile()`.")
        return parts[0] if len(parts) == 1 else keras.ops.sum(parts), tracked

    def _needs_count(self) -> bool:
        return self._found is not None and self._found.needs_count

    def _totals(self) -> Any:
        """Weights of the window that only a forward reveals, counted without a trace of it.

        In a graph everything but the masks is pruned from this forward.
        """
        if self._counted is None:
            counting = trace(self._cut, lambda index, batch: self._count(batch))
            sums, _ = fold(counting, lambda _, counted: Output([counted], []), add)
            self._counted = sums[0]
        return self._counted

    def _count(self, batch: Any) -> Any:
        x, y, sample_weight = batch
        # Random seeds, statistics and added losses change in the scope only.
        with keras.StatelessScope():
            y_pred = self._forward(x)
            found = contribution(
                self._model._compile_loss,
                y,
                y_pred,
                sample_weight,
                Rows(rows_of(batch), self._rows),
                _Ones,
            )
        return found.counted

    def _commit(self, added: list[Any], sparse: Sequence[Any]) -> None:
        model = self._model
        by_rows = self._found is not None and self._found.tracked_by_rows
        tracked = 0 if self._found is None else len(self._found.tracked)
        loss, values, gradients = added[0], added[1 : 1 + tracked], added[1 + tracked :]
        # Counters depend on no gradient: without this they would move although a batch is refused.
        with tf.control_dependencies([loss]):
            model._loss_tracker.update_state(loss, sample_weight=self._rows)
            if tracked:
                weight = self._rows if by_rows else None
                for metric, value in zip(model._compile_loss.metrics, values, strict=True):
                    metric.update_state(value, sample_weight=weight)
            variables = model.trainable_variables
            if variables:
                gradients = finished(gradients, sparse, variables)
                model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
            else:
                warnings.warn("The model does not have any trainable weights.", stacklevel=2)


class _Ones:
    """Weights that nobody reads: divides by 1 while the weights are still being counted."""

    def __getitem__(self, k: int) -> float:
        return 1.0


def _wide_gradients(tape: Any, loss: Any, variables: list[Any], rows: Rows) -> list[Any]:
    """Gradients in the dtype of the buffer.

    The loss is already this micro-batch's part of the window's. Half-precision gradients are taken
    of the micro-batch's own mean and scaled in the wide dtype, where few bits are lost.
    """
    if not any(_is_half(variable) for variable in variables):
        return tape.gradient(loss, variables)
    share = rows.share("float32")
    upstream = tf.ones_like(loss) / tf.cast(share, loss.dtype)
    gradients = tape.gradient(loss, variables, output_gradients=upstream)
    return [widened(gradient, share) for gradient in gradients]


def _is_half(variable: Any) -> bool:
    return accumulator_dtype(variable.dtype) != variable.dtype
