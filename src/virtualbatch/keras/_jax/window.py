"""One batch of `fit` as micro-batches, on JAX.

Each micro-batch adds its part of the loss, the gradients and the BatchNorm moments. It passes the
state that its layers and metrics changed to the next one. Then optimizer, trackers and moving
averages are updated once. Nothing is assigned: the new state is returned.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax import lax
from keras.src import backend

from virtualbatch.jax._objective import wide_dtype
from virtualbatch.jax._segment import Cut
from virtualbatch.jax._stats import part_of, squared_norm
from virtualbatch.keras._added_losses import AddedLosses
from virtualbatch.keras._batchnorm import (
    assign_statistics,
    merged,
    moving_statistics,
    recorded_moments,
)
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._jax.packing import PackedSegment, branches, chosen
from virtualbatch.keras._jax.passes import Step, TracedPass, Window, eager_pass
from virtualbatch.keras._jax.stateless import State, StatelessModel, losses_of
from virtualbatch.keras._not_finite import LOSSES, NO_PLACE
from virtualbatch.keras._overwritten import merged_gradients, updated
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._train_step import STATS
from virtualbatch.keras._window import WindowModel
from virtualbatch.noise.estimate import WindowStats
from virtualbatch.window.shares import accumulator_dtype


class Sums(NamedTuple):
    """What is summed over micro-batches.

    Fields:
        losses: the loss and per-output losses.
        gradients: gradients in the dtype of the buffer.
        moments: BatchNorm moments.
        mean_square: a list with this part of the statistics; empty if no statistics are needed.
    """

    losses: list[Any]
    gradients: list[Any]
    moments: list[Any]
    mean_square: list[Any]


class WindowRun:
    """One batch of `fit` as micro-batches.

    Args:
        model: a model that is built and compiled.
        cut: the batch, cut.
        state: the state at the start of the window.
        stretch: micro-batch -> its stretch, see `Rows`.
        added: what is known about the losses that layers add.
        stats: whether the logs get statistics of the window.
        gathering: whose predictions are gathered; only the subclass `GatheredRun` passes it.
    """

    def __init__(
        self,
        model: keras.Model,
        cut: Cut,
        state: State,
        stretch: Callable[[Any], float],
        added: AddedLosses,
        stats: bool,
        gathering: Gathering | None = None,
    ):
        self._model = model
        self._with_stats = stats
        self._stretch = stretch
        self._cut = cut
        self._state = state
        self._functions = StatelessModel(model, state)
        self._window = WindowModel(model, sum(cut.rows), added, gathering)
        # Known once a micro-batch has run or was traced.
        self._called: list[Any] = []

    @property
    def losses_of_one_number(self) -> list[str]:
        """Names of losses that gave a number rather than one value per row; known after `train`."""
        return self._window.losses_of_one_number

    def train(self, compiled: bool) -> tuple[dict[str, Any], State]:
        """Runs the window.

        Args:
            compiled: whether this runs inside a trace.

        Returns:
            The logs and the new state.
        """
        found = self._run(compiled)
        sums, (seen, metrics) = found.sums, found.state
        model, window, state = self._model, self._window, self._state
        gradients = [
            gradient.astype(value.dtype)
            for gradient, value in zip(sums.gradients, state.trainable, strict=True)
        ]
        trainable, optimizer = model.optimizer.stateless_apply(
            state.optimizer, gradients, state.trainable
        )
        with self._functions.scope(state.trainable, state.non_trainable):
            start = moving_statistics(window.batchnorm)
        with self._functions.scope(trainable, seen, metrics) as scope:
            assign_statistics(self._called, start, sums.moments)
            window.track(sums.losses[0], sums.losses[1:])
            logs = window.results(found.latest)
        if self._with_stats:
            logs[STATS] = self._stats(gradients, *sums.mean_square)
        logs[LOSSES] = self.told(found.kept, sums.losses[0])
        non_trainable, metrics = self._functions.changed(scope)
        return logs, State(trainable, non_trainable, optimizer, metrics)

    def _run(self, compiled: bool) -> Window:
        """Forward and backward of all micro-batches."""
        if not compiled:
            return eager_pass(
                self._cut, self._micro, self._before, self._totals, None, self._merged
            )
        # A loss needs at most two counts. Only the trace shows whether it needs any.
        losses = getattr(self._model._compile_loss, "_flat_losses", None) or []
        totals = jax.ShapeDtypeStruct((2 * len(losses) + 2,), keras.backend.floatx())

        def step(batch: Any, rows: int, before: Any, totals: Any, own: None) -> Step:
            return self._micro(batch, rows, before, lambda: totals, own)

        traced = TracedPass(self._cut, step, self._before, totals, None)
        given = jnp.zeros(totals.shape, totals.dtype)
        if self._window.needs_count:
            counted = self._totals()
            given = given.astype(counted.dtype).at[: len(counted)].set(counted)
            given = given.astype(totals.dtype)
        return traced.run(self._nothing(traced.sums), given, self._merged)

    def told(self, kept: list[Any], loss: Any) -> Any:
        """The entry for losses in the logs.

        Args:
            kept: parts of the loss; for each segment, micro-batches stacked.
            loss: the loss of the window.
        """
        del loss
        rows = [NO_PLACE if n is None else n for n in self._cut.rows_in_order]
        parts = jnp.concatenate(kept)
        return jnp.stack([parts, jnp.asarray(rows, parts.dtype)], 1)

    @property
    def _before(self) -> tuple[list[Any], list[Any]]:
        """The state with which the first micro-batch begins."""
        return self._state.non_trainable, self._state.metrics

    def _micro(
        self, batch: Any, rows: int, before: Any, totals: Callable[[], Any], own: None
    ) -> Step:
        """Forward and backward of one micro-batch."""
        del own
        model, window, functions = self._model, self._window, self._functions
        here = Rows(rows, window.rows, self._stretch(batch))

        def objective(trainable: list[Any]) -> tuple[Any, Any]:
            with recorded_moments(window.batchnorm) as seen:
                y_pred, non_trainable, losses = functions.forward(batch[0], trainable, before[0])
            added_shapes = partial(functions.added_shapes, batch[0])
            with (
                losses_of(model, losses or []),
                functions.scope(trainable, non_trainable, before[1]) as scope,
            ):
                loss, tracked = window.loss(batch, y_pred, here, totals, added_shapes)
                latest = window.update_metrics(batch, self._shown(y_pred), here)
            if window.unreduced:
                # Raises JAX' own error, as for the whole batch.
                jax.grad(lambda _: jnp.broadcast_to(loss, (window.rows,)))(0.0)
            self._called = [layer for layer, _ in seen]
            moments = [found for _, found in seen]
            aux = ([loss, *tracked], moments, functions.changed(scope), latest)
            return functions.scaled(loss), aux

        scaled, differentiate, aux = jax.vjp(objective, self._state.trainable, has_aux=True)
        losses, moments, after, latest = aux
        (gradients,) = differentiate(self._upstream(here, jnp.ones_like(scaled)))
        gradients = [self._widened(gradient, here) for gradient in gradients]
        moments = jax.tree.map(jnp.asarray, moments)
        parts = []
        if self._with_stats:
            parts = [part_of(updated(gradients, window.overwritten), here.share("float32"))]
        kept = losses[0].astype(wide_dtype(losses[0]))
        return Step(Sums(losses, gradients, moments, parts), after, latest, kept)

    def _shown(self, y_pred: Any) -> Any:
        """Predictions in the form that metrics see. If rows are packed, masks are kept.

        On JAX, Keras loses masks here. Without a mask, metrics would count padding, and the amount
        of padding depends on the cut.
        """
        shown = lax.stop_gradient(y_pred)
        if any(isinstance(segment, PackedSegment) for segment in self._cut.segments):
            for to, source in zip(
                keras.tree.flatten(shown), keras.tree.flatten(y_pred), strict=True
            ):
                backend.set_keras_mask(to, backend.get_keras_mask(source))
        return shown

    def _stats(self, gradients: Any, mean_square: Any) -> WindowStats:
        """The statistics of a window, without the optimizer's loss scale, which changes."""
        undo = self._functions.scaled(jnp.ones((), mean_square.dtype)) ** -2
        square = squared_norm(updated(gradients, self._window.overwritten))
        return WindowStats(self._window.rows, self._cut.count, mean_square * undo, square * undo)

    def _upstream(self, rows: Rows, cotangent: Any) -> Any:
        """The cotangent with which the backward pass begins.

        The given cotangent is for this micro-batch's part of the window's loss. Half-precision
        gradients are computed for the micro-batch's own mean instead, and scaled in the wide dtype,
        where few bits are lost.
        """
        return cotangent / rows.share(cotangent.dtype) if self._scales_later() else cotangent

    def _widened(self, gradient: Any, rows: Rows) -> Any:
        wide = gradient.astype(wide_dtype(gradient))
        return wide * rows.share(wide.dtype) if self._scales_later() else wide

    def _scales_later(self) -> bool:
        # The backward pass of overwritten variables returns maxima for the window's loss. They
        # cannot be scaled.
        return not any(self._window.overwritten) and any(
            accumulator_dtype(str(value.dtype)) != str(value.dtype)
            for value in self._state.trainable
        )

    def _nothing(self, like: Any) -> Any:
        """Neutral sums in the shapes of other sums: merging them with any sums changes nothing."""
        return jax.tree.map(jnp.zeros_like, like)._replace(
            gradients=[
                jnp.full_like(x, -jnp.inf if largest else 0)
                for x, largest in zip(like.gradients, self._window.overwritten, strict=True)
            ]
        )

    def _merged(self, a: Sums, b: Sums) -> Sums:
        return Sums(
            [x + y for x, y in zip(a.losses, b.losses, strict=True)],
            merged_gradients(a.gradients, b.gradients, self._window.overwritten, jnp.maximum),
            [tuple(found) for found in merged(a.moments, b.moments)],
            [x + y for x, y in zip(a.mean_square, b.mean_square, strict=True)],
        )

    def _totals(self) -> Any:
        """The weights vector of the window. XLA prunes its forwards to what masks need."""
        state, window = self._state, self._window

        def counted(batch: Any, rows: int) -> Any:
            y_pred, _, _ = self._functions.forward(batch[0], state.trainable, state.non_trainable)
            with self._functions.scope(state.trainable, state.non_trainable, state.metrics):
                return window.weights(batch, y_pred, Rows(rows, window.rows, self._stretch(batch)))

        total = None
        for segment in self._cut.segments:
            functions = [
                partial(lambda get, rows, k: counted(get(k), rows), get, segment.rows)
                for get in branches(segment)
            ]
            one = partial(lambda segment, fns, k: chosen(segment, fns, k, k), segment, functions)
            if segment.count == 1:
                found = one(0)
            else:
                found = lax.map(one, jnp.arange(segment.count, dtype=jnp.int32)).sum(0)
            total = found if total is None else total + found
        return total
