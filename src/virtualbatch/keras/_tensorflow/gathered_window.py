"""One batch of `fit` whose losses see all rows, on TensorFlow; see `virtualbatch.keras._gather`.

As in a plain window, a micro-batch is traced as one function and a pass is one loop over
micro-batches. Between the passes, Keras' own loss runs on all rows, and a tape watches the
predictions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

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
from virtualbatch.keras._gather.loss import not_of_rows
from virtualbatch.keras._gather.state import state_variables
from virtualbatch.keras._not_finite import LOSSES
from virtualbatch.keras._overwritten import merged_gradients
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._tensorflow.cut import Cut
from virtualbatch.keras._tensorflow.gathered_results import Backwards, Forwards, OfAllRows
from virtualbatch.keras._tensorflow.packing import PackedCut
from virtualbatch.keras._tensorflow.second_pass import State, refuse_hidden_randomness
from virtualbatch.keras._tensorflow.window import WindowRun, is_half, rows_of
from virtualbatch.tensorflow._gradients import add, finished, split_sparse, widened
from virtualbatch.tensorflow._loop import Output, Traced, bound, fold, trace
from virtualbatch.tensorflow._segment import Segment

_TOTALS = tf.TensorSpec([None], tf.float64)


class GatheredRun(WindowRun):
    """One batch of `fit` as micro-batches that run forward twice.

    Args:
        model: see `WindowRun`.
        batch: (x, y, sample_weight) of all rows.
        cut: the batch, cut.
        rows: see `WindowRun`.
        added: see `WindowRun`.
        gathering: whose predictions are gathered.
    """

    def __init__(
        self,
        model: keras.Model,
        batch: Any,
        cut: Cut | PackedCut,
        rows: Any,
        added: AddedLosses,
        gathering: Gathering,
    ):
        in_order = isinstance(cut, Cut)
        super().__init__(model, [], rows, cut.stretch, added, False, in_order, gathering)
        self._batch = batch
        self._gathered_by = gathering
        self._all_rows = cut
        self._trimmed: list[bool] = []

    def train(self) -> dict[str, Any]:
        """See `WindowRun`."""
        model, window = self._model, self._window
        self._start = moving_statistics(window.batchnorm)
        state = state_variables(model)
        before = State(state)
        first = self.first_pass(self._traced(self._all_rows.segments(), self._forward))
        whole = self._loss_of_all_rows(first)
        after = State(state)
        before.restore(whole.predictions)
        losses, tracked, gradients, latest = self._second_pass(whole, first.counts)
        after.restore(gradients)
        total = whole.losses[0] if not losses else whole.losses[0] + losses[0]
        self._commit([total, *window.tracked(whole.losses[1:], tracked)], gradients, [])
        assign_statistics(self._called, self._start, first.moments)
        return window.results(whole.latest or latest) | {LOSSES: (total, first.told)}

    def first_pass(self, traced: Sequence[Traced]) -> Forwards:
        """The results of all micro-batches' forwards."""
        (moments, added, counts, _), (*arrays, told) = fold(
            traced,
            lambda _, found: Output(found[0], [*self._lengthened(found[1]), found[2]]),
            lambda a, b: (merged(a[0], b[0]), add(a[1], b[1]), add(a[2], b[2]), a[3] + b[3]),
        )
        return Forwards(moments, added, counts, self._in_order(arrays), self._batch, told)

    def own_rows(self, array: Any) -> Any:
        """Those rows of an array of all rows that this run cuts: all of them here."""
        return tf.convert_to_tensor(array)

    def sums_of_second_pass(self, traced: Sequence[Traced], own: Sequence[Any]) -> Backwards:
        """The results of all micro-batches' backward passes.

        Args:
            traced: the traced micro-batches.
            own: see `OfAllRows`.
        """
        (losses, dense, latest), sparse = fold(
            traced,
            lambda _, found: Output(found[:3], found[3]),
            lambda a, b: (
                add(a[0], b[0]),
                merged_gradients(a[1], b[1], self._window.overwritten, tf.maximum),
                b[2],
            ),
        )
        return Backwards(losses, dense, latest, list(sparse), own)

    def _traced(self, cut: list[Segment], step: Callable[..., Any], *extra: Any) -> list[Traced]:
        """Traces a step of a micro-batch. Every micro-batch also gets the arrays in `extra`."""
        if tf.executing_eagerly():
            return trace(cut, lambda index, batch: step(batch, *extra))
        traced = trace(
            cut,
            lambda index, batch, *given: step(batch, *given),
            self._model.jit_compile,
            [tf.TensorSpec([None] * len(x.shape), x.dtype) for x in extra],
        )
        for entry in traced:
            refuse_hidden_randomness(entry)
        return [bound(entry, *extra) for entry in traced] if extra else traced

    def _lengthened(self, arrays: Sequence[Any]) -> list[Any]:
        """Predictions and masks of a micro-batch, padded to the length of the whole batch."""
        if not self._trimmed:
            self._trimmed = self._all_rows.trimmed(self._gathered_by, len(arrays) // 2)
        return [
            None if array is None else self._all_rows.lengthened(array, trimmed)
            for array, trimmed in zip(arrays, self._trimmed * 2, strict=True)
        ]

    def _in_order(self, arrays: Sequence[Any]) -> list[Any]:
        with tf.control_dependencies(self._one_entry_per_row(arrays)):
            return [None if array is None else self._all_rows.in_order(array) for array in arrays]

    def _one_entry_per_row(self, arrays: Sequence[Any]) -> list[Any]:
        """Refuses predictions without rows; a graph can check this only when it runs."""
        rows = self._window.rows
        counts = [tf.shape(array)[0] for array in arrays if array is not None]
        if tf.executing_eagerly():
            for count in counts:
                if count != rows:
                    raise ValueError(not_of_rows(int(count), int(rows)))
            return []
        before, between, after = not_of_rows("COUNT", "COUNT").split("COUNT")
        fits = tf.reduce_all(tf.equal(tf.stack(counts), rows))
        return [tf.debugging.Assert(fits, [before, tf.stack(counts), between, rows, after])]

    def _forward(self, batch: Any) -> Any:
        """Forward of one micro-batch. Returns its sums, its gathered arrays and its log line."""
        window = self._window
        rows = Rows(rows_of(batch), window.rows, self._stretch(batch))
        with recorded_moments(window.batchnorm) as seen:
            y_pred = window.forward(batch[0])
        self._called = [layer for layer, _ in seen]
        added = window.added(rows, lambda few: self._added_shapes(batch[0], few))
        counted = window.counted_of(batch, y_pred, rows)
        counts = [] if counted is None else [tf.cast(counted, tf.float64)]
        arrays = window.arrays(batch, y_pred, rows)
        moments = [
            found._replace(weight=tf.cast(found.weight, found.mean.dtype)) for _, found in seen
        ]
        # A loop waits only for its sums, so one of them must depend on the whole forward.
        waited_for = tf.add_n(
            [tf.reduce_sum(tf.cast(x, tf.float32)) for x in arrays if x is not None]
        )
        told = self._told(_nan_or_0(window.predictions(y_pred)), rows)
        return (moments, added, counts, waited_for), arrays, told

    def _loss_of_all_rows(self, first: Forwards) -> OfAllRows:
        model, window, added = self._model, self._window, first.added
        y_pred = window.joined(first.arrays)
        predictions = window.predictions(y_pred)
        watched = [x for x in (*predictions, *added) if x.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            loss, tracked = window.loss_of_all_rows(first.batch, y_pred, added)
            scaled = model.optimizer.scale_loss(loss)
        variables = model.trainable_variables
        found = tape.gradient(scaled, [*watched, *variables])
        gradients = iter(found[: len(watched)])
        by_leaf = [next(gradients) if x.dtype.is_floating else None for x in (*predictions, *added)]
        latest = tree.map_structure(
            tf.convert_to_tensor, window.update_metrics_of_all_rows(first.batch, y_pred)
        )
        count = len(predictions)
        own = found[len(watched) :]
        return OfAllRows([loss, *tracked], by_leaf[:count], by_leaf[count:], own, latest)

    def _second_pass(self, whole: OfAllRows, counts: list[Any]) -> Any:
        """(losses, per-output losses, gradients, metrics).

        Losses and metrics are those that do not see all rows. Gradients are the window's whole
        gradients.
        """
        variables = self._model.trainable_variables
        needed = [k for k, gradient in enumerate(whole.predictions) if gradient is not None]
        cut = self._all_rows.segments_with(
            [self.own_rows(whole.predictions[k]) for k in needed],
            [self._trimmed[k] for k in needed],
        )
        upstream = [x for x in whole.added if x is not None]
        totals = counts or [tf.zeros([1], tf.float64)]

        def second(pair: Any, totals: Any, *upstream: Any) -> Any:
            batch, of_predictions = pair
            return self._backward(batch, needed, of_predictions, whole, upstream, totals)

        found = self.sums_of_second_pass(self._traced(cut, second, *totals, *upstream), whole.own)
        gradients = finished(found.dense, found.sparse, variables)
        with_own = [
            mine if own is None else _sum(mine, own, variable)
            for mine, own, variable in zip(gradients, found.own, variables, strict=True)
        ]
        return found.losses[:1], found.losses[1:], with_own, found.latest

    def _backward(
        self,
        batch: Any,
        needed: Sequence[int],
        of_predictions: Sequence[Any],
        whole: OfAllRows,
        of_added: Sequence[Any],
        totals: Any,
    ) -> Any:
        """Forward again and backward of one micro-batch.

        Returns:
            (losses, dense gradients, results of metrics, values and indices of sparse gradients).
        """
        window = self._window
        rows = Rows(rows_of(batch), window.rows, self._stretch(batch))
        with tf.GradientTape() as tape:
            y_pred = window.forward(batch[0])

            def shapes(few: int) -> Sequence[Shape]:
                with tape.stop_recording():
                    return self._added_shapes(batch[0], few)

            added = window.added(rows, shapes)
            loss, tracked = window.cut_loss(batch, y_pred, rows, lambda: totals)
            predictions = window.predictions(y_pred)
            targets = [predictions[k] for k in needed]
            targets += [x for x, there in zip(added, whole.added, strict=True) if there is not None]
            if loss is not None:
                targets.append(self._model.optimizer.scale_loss(loss))
        upstream = [*of_predictions, *of_added]
        if loss is not None:
            upstream.append(tf.ones_like(targets[-1]))
        dense, sparse = split_sparse(self._product(tape, targets, upstream, rows))
        found = window.update_metrics(batch, y_pred, rows)
        latest = tree.map_structure(tf.convert_to_tensor, found)
        return [] if loss is None else [loss, *tracked], dense, latest, sparse

    def _product(
        self, tape: Any, targets: Sequence[Any], upstream: Sequence[Any], rows: Rows
    ) -> list[Any]:
        """Gradients of the sum of targets times upstream gradients, in the dtype of the buffer.

        The upstream gradients are for this micro-batch's part of the window. For half precision see
        `WindowRun._wide_gradients`.
        """
        variables = self._model.trainable_variables
        if not targets:
            return [None] * len(variables)
        later = 1.0
        if any(map(is_half, variables)) and not any(self._window.overwritten):
            later = rows.share("float32")
            upstream = [x / tf.cast(later, x.dtype) for x in upstream]
        given = [tf.cast(x, y.dtype) for x, y in zip(upstream, targets, strict=True)]
        gradients = tape.gradient(list(targets), variables, output_gradients=given)
        return [widened(gradient, later) for gradient in gradients]


def _nan_or_0(predictions: Sequence[Any]) -> Any:
    """NaN where predictions of a micro-batch are not all finite, else 0."""
    finite = [tf.reduce_all(tf.math.is_finite(x)) for x in predictions if x.dtype.is_floating]
    return tf.where(tf.reduce_all(tf.stack(finite)), 0.0, math.nan)


def _sum(a: Any, b: Any, variable: Any) -> Any:
    """The sum of two gradients of a variable. The first may be None, and each may be sparse."""
    b = tf.convert_to_tensor(b)
    return b if a is None else tf.convert_to_tensor(a) + tf.cast(b, variable.dtype)
