"""Keras on TensorFlow: a `train_step` that runs one batch as a window.

A batch is cut, each micro-batch adds its part of the loss, of the gradients and of the BatchNorm
moments, and the optimizer, the trackers and the moving averages move once at the end.
"""

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import tree

from virtualbatch.keras import refuse_accumulating_optimizer
from virtualbatch.keras._batchnorm import (
    assign_statistics,
    batchnorm_layers,
    merged,
    moving_statistics,
    recorded_moments,
)
from virtualbatch.keras._terms import Contribution, Rows, contribution
from virtualbatch.split import sizes_disagree
from virtualbatch.tensorflow._batch import Segment, is_array, segments
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


class TrainStep:
    """The `train_step` of a model that accumulates.

    Args:
        model: the model.
        microbatch_size: rows of one micro-batch, or None.
        accumulation_steps: micro-batches per window, or None.
    """

    is_virtualbatch = True

    def __init__(
        self, model: keras.Model, microbatch_size: int | None, accumulation_steps: int | None
    ):
        self._model = model
        self._microbatch_size = microbatch_size
        self._accumulation_steps = accumulation_steps

    def __call__(self, data: Any) -> dict[str, Any]:
        """Trains on one batch, as Keras' `train_step` does."""
        model = self._model
        refuse_accumulating_optimizer(model.optimizer)
        if tf.executing_eagerly():
            # Losses, metrics and the optimizer are built where they are first used.
            if not all(layer.built for layer in model._flatten_layers()):
                model(keras.utils.unpack_x_y_sample_weight(data)[0], training=False)
        else:
            with tf.init_scope():
                _build(model, _specs(data))
        batch = self._with_agreeing_sizes(keras.utils.unpack_x_y_sample_weight(data))
        cut = segments(
            batch,
            self._microbatch_size,
            None if self._microbatch_size else self._accumulation_steps,
        )
        return _Window(model, cut, _rows(batch)).train()

    def _with_agreeing_sizes(self, batch: Any) -> Any:
        """The batch, readable only if both sizes agree for it.

        The last batch of an epoch may be short. Which one that is only the data knows, but the
        first of an epoch, where the loss tracker has counted nothing yet, is not.
        """
        size, steps = self._microbatch_size, self._accumulation_steps
        if size is None or steps is None:
            return batch
        rows = _rows(batch)
        count = (rows + size - 1) // size
        first = tf.equal(self._model._loss_tracker.count, 0)
        agree = tf.logical_or(
            tf.equal(count, steps), tf.logical_and(count < steps, tf.logical_not(first))
        )
        if tf.executing_eagerly():
            if not agree:
                raise ValueError(sizes_disagree(int(rows), size, steps))
            return batch
        check = tf.debugging.Assert(agree, [sizes_disagree("a batch of", size, steps), rows])
        with tf.control_dependencies([check]):
            return tf.nest.map_structure(
                lambda leaf: tf.identity(leaf) if is_array(leaf) else leaf, batch
            )


def make_train_function(model: keras.Model) -> Callable[..., Any]:
    """A `make_train_function` that keeps XLA inside the loop over micro-batches.

    Keras would compile the whole `train_step`. A loop inside an XLA program is slow on some
    devices (on CPU a convolution in it takes a thousand times longer), so only the micro-batch's
    forward and backward are compiled, and the loop around them stays a plain graph.
    """

    def make(force: bool = False) -> None:
        if model.train_function is not None and not force:
            return
        jit_compile = model.jit_compile
        model.jit_compile = False
        try:
            type(model).make_train_function(model, force=force)
        finally:
            model.jit_compile = jit_compile
        run = model.train_function

        def train_function(iterator: Any) -> Any:
            if not model.run_eagerly:
                iterator = _build_before_trace(model, iterator)
            try:
                return run(iterator)
            except tf.errors.InvalidArgumentError as error:
                raise _as_user_error(error) from error

        model.train_function = train_function

    return make


def _as_user_error(error: tf.errors.InvalidArgumentError) -> Exception:
    """The ValueError behind a check that could only run inside the graph."""
    refusals = ("microbatch_size and accumulation_steps must", "All arrays of a batch must")
    lines = [line for line in str(error).splitlines() if any(text in line for text in refusals)]
    return ValueError(lines[0]) if lines else error


def _rows(batch: Any) -> Any:
    """Rows of a batch as an int32 scalar, read from its first array as Keras does."""
    leaf = next(leaf for leaf in tree.flatten(batch) if leaf is not None)
    if isinstance(leaf, tf.RaggedTensor):
        return leaf.nrows(tf.int32)
    return tf.shape(leaf)[0]


def _build(model: keras.Model, specs: Any) -> None:
    """Creates every variable of the model, its losses, metrics and optimizer.

    Args:
        model: the model.
        specs: type specs of what `train_step` gets.
    """
    parts = [*model._flatten_layers(), model._compile_loss, model._compile_metrics]
    if not all(part.built for part in parts if part is not None):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(specs)

        def scratch(x: Any, y: Any, sample_weight: Any) -> None:
            y_pred = model(x, training=False) if model._call_has_training_arg else model(x)
            model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
            model._compute_loss(x, y, y_pred, sample_weight, training=False)

        # Traced and thrown away: this creates the variables and changes none.
        tf.function(scratch, autograph=False).get_concrete_function(x, y, sample_weight)
        model._clear_losses()
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def _build_before_trace(model: keras.Model, iterator: Any) -> Any:
    """Builds from the first batch what is not built, outside any graph.

    A variable that a trace creates makes TensorFlow trace it all a second time.

    Returns:
        The iterator, with its first batch put back.
    """
    if isinstance(iterator, tf.data.Iterator):
        _build(model, tree.map_structure(_array_spec, iterator.element_spec))
    elif not isinstance(iterator, tf.distribute.DistributedIterator):
        first = next(iterator)
        _build(model, _specs(first))
        return chain([first], iterator)
    return iterator


def _specs(data: Any) -> Any:
    return tree.map_structure(
        lambda leaf: tf.type_spec_from_value(leaf) if is_array(leaf) else leaf, data
    )


def _array_spec(spec: Any) -> Any:
    """The spec, or None for one of no array: a dataset writes None as an empty optional."""
    return spec if hasattr(spec, "dtype") else None


class _Window:
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

    def _micro(self, batch: Any, totals: Callable[[], Any]) -> _Micro:
        """Forward and backward of one micro-batch."""
        model = self._model
        x, y, sample_weight = batch
        rows = Rows(_rows(batch), self._rows)
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
                Rows(_rows(batch), self._rows),
                _Ones,
            )
        return found.counted

    def _commit(self, added: list[Any], sparse: list[Any]) -> None:
        model = self._model
        tracked = 0 if self._found is None else len(self._found.tracked)
        loss, values, gradients = added[0], added[1 : 1 + tracked], added[1 + tracked :]
        model._loss_tracker.update_state(loss, sample_weight=self._rows)
        if tracked:
            weight = self._rows if self._found.tracked_by_rows else None
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
