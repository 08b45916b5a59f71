"""Keras on TensorFlow: a `train_step` that runs one batch as a window.

A batch is cut, each micro-batch adds its part of the loss, of the gradients and of the BatchNorm
moments, and the optimizer, the trackers and the moving averages move once at the end.
"""

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import tree

from virtualbatch.keras import refuse_accumulating_optimizer, refuse_replicas
from virtualbatch.keras._batchnorm import (
    assign_statistics,
    batchnorm_layers,
    merged,
    moving_statistics,
    recorded_moments,
)
from virtualbatch.keras._terms import Contribution, Rows, contribution
from virtualbatch.split import sizes_disagree
from virtualbatch.tensorflow._batch import Segment, is_array, segments, specs
from virtualbatch.tensorflow._gradients import add, finished, split_sparse, widened
from virtualbatch.tensorflow._loop import Output, bound, fold, trace
from virtualbatch.window import accumulator_dtype

_log = logging.getLogger("virtualbatch")

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
        self._layers_built = False
        self._said: set[str] = set()

    def __call__(self, data: Any) -> dict[str, Any]:
        """Trains on one batch, as Keras' `train_step` does."""
        model = self._model
        refuse_replicas(model)
        refuse_accumulating_optimizer(model.optimizer)
        batch = keras.utils.unpack_x_y_sample_weight(data)
        with tf.variable_creator_scope(_created_outside):
            batch = self._with_agreeing_sizes(batch)
            cut = segments(
                batch,
                self._microbatch_size,
                None if self._microbatch_size else self._accumulation_steps,
            )
            if not self._layers_built:
                _build_layers(model, cut[0].get(0)[0])
                self._layers_built = True
            _build_optimizer(model)
            window = _Window(model, cut, _rows(batch))
            results = window.train()
            self._say(window.losses_of_one_number())
        return results

    def _say(self, losses: list[str]) -> None:
        """Names losses that only their author knows how to cut, once per call of `accumulate`."""
        for name in losses:
            if name not in self._said:
                _log.warning(
                    "The loss %s returns one number: it is taken for one mean over rows.", name
                )
        self._said.update(losses)

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
        before, after = sizes_disagree("ROWS", size, steps).split("ROWS")
        check = tf.debugging.Assert(agree, [before, rows, after])
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
    # Keras asks for the function once per fit, so that is when the data may still be empty.
    trained = False

    def make(force: bool = False) -> None:
        nonlocal trained
        trained = False
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
            nonlocal trained
            try:
                results = run(iterator)
            except tf.errors.InvalidArgumentError as error:
                text = _refusal(error)
                if text is None:
                    raise
                raise ValueError(text) from error
            except (tf.errors.OutOfRangeError, StopIteration) as error:
                if trained:
                    raise
                raise ValueError(
                    "fit needs at least one batch. Got no data. "
                    "A generator can be read only once: pass a fresh one."
                ) from error
            trained = True
            return results

        model.train_function = train_function

    return make


def _refusal(error: tf.errors.InvalidArgumentError) -> str | None:
    """Text of a check that could only run inside the graph, or None if it was none of ours."""
    found = re.search(
        r"assertion failed: \[((?:microbatch_size and|All arrays of).*)\]", str(error)
    )
    # What was printed is pieces of text and numbers, each in brackets.
    return " ".join(re.split(r"\s*\] \[\s*", found[1])) if found else None


def _rows(batch: Any) -> Any:
    """Rows of a batch as an int32 scalar, read from its first array as Keras does."""
    leaf = next(leaf for leaf in tree.flatten(batch) if leaf is not None)
    if isinstance(leaf, tf.RaggedTensor):
        return leaf.nrows(tf.int32)
    return tf.shape(leaf)[0]


def _build_layers(model: keras.Model, x: Any) -> None:
    """Creates the variables of layers that have seen no data, and changes none.

    The window reads the statistics of a BatchNorm before its first forward.

    Args:
        model: the model.
        x: inputs of a micro-batch.
    """

    def forward(x: Any) -> Any:
        return model(x, training=False) if model._call_has_training_arg else model(x)

    if all(layer.built for layer in model._flatten_layers()):
        return
    if tf.executing_eagerly():
        forward(x)
    else:
        with tf.init_scope():
            tf.function(forward, autograph=False).get_concrete_function(specs(x))


def _build_optimizer(model: keras.Model) -> None:
    """Creates the optimizer's variables: it scales a loss by the first scale until it has one."""
    optimizer = model.optimizer
    if not optimizer.built and model.trainable_variables:
        # The scope in which Keras builds an optimizer at its first update: it names the variables.
        with tf.init_scope(), keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(model.trainable_variables)


def _created_outside(next_creator: Callable[..., Any], **arguments: Any) -> Any:
    """Creates a variable outside the graph that is being traced.

    Left in it, one variable makes TensorFlow trace the whole step once or twice more.
    """
    with tf.init_scope():
        return next_creator(**arguments | {"experimental_enable_variable_lifting": False})


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

    def losses_of_one_number(self) -> list[str]:
        """Names of losses that gave a number rather than one value per row; known after `train`."""
        return [] if self._found is None else self._found.numbers

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
        # Counters depend on no gradient: without this they would move although a batch is refused.
        with tf.control_dependencies([loss]):
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
