"""One batch of `fit` whose loss sees all rows, on JAX: forward, loss, and forward again.

The first pass keeps the predictions of all rows. The loss is computed once on them. The second pass
goes through the same micro-batches, from the state in which the first one began, with the gradients
of their predictions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras

from virtualbatch.jax._objective import wide_dtype
from virtualbatch.jax._segment import Cut
from virtualbatch.keras._added_losses import AddedLosses
from virtualbatch.keras._batchnorm import merged, recorded_moments
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._jax.gathered_rows import Arrays, GatheredRows
from virtualbatch.keras._jax.passes import Step, Window, run_pass
from virtualbatch.keras._jax.stateless import State, losses_of
from virtualbatch.keras._jax.window import Sums, WindowRun
from virtualbatch.keras._overwritten import merged_gradients
from virtualbatch.keras._rows import Rows


class _Seen(NamedTuple):
    """What is summed over the micro-batches of the first pass.

    Fields:
        added: losses that layers have added.
        counted: the weights vector, see `WindowModel.counted`; None if nothing is counted.
        moments: BatchNorm moments.
    """

    added: list[Any]
    counted: Any
    moments: list[Any]


class _Whole(NamedTuple):
    """The loss of all rows and its gradients.

    Fields:
        losses: the loss and per-output losses.
        gradients: gradients of the trainable variables, which the loss may use itself.
        of_predictions: gradients of the predictions; for each segment, micro-batches stacked.
        of_added: gradients of the losses that layers have added.
        state: values of the non-trainable and the metric variables after the loss.
        latest: the result of an overridden `compute_metrics`; else empty.
    """

    losses: list[Any]
    gradients: list[Any]
    of_predictions: list[list[Any]]
    of_added: list[Any]
    state: tuple[list[Any], list[Any]]
    latest: dict[str, Any]


class GatheredRun(WindowRun):
    """One batch of `fit` whose loss sees all rows.

    Args:
        model: see `WindowRun`.
        batch: (x, y, sample_weight) of all rows.
        cut: the batch, cut.
        order: row numbers in the order of the cut, if rows are packed; else None.
        state: see `WindowRun`.
        stretch: see `WindowRun`.
        added: see `WindowRun`.
        gathering: whose predictions are gathered.
    """

    def __init__(
        self,
        model: keras.Model,
        batch: Any,
        cut: Cut,
        order: Any,
        state: State,
        stretch: Callable[[Any], float],
        added: AddedLosses,
        gathering: Gathering,
    ):
        super().__init__(model, cut, state, stretch, added, False, gathering)
        self._batch = batch
        self._rows = GatheredRows(cut, order, self._shapes)
        self._is_cut = not all(gathering.losses or [])
        self._is_seen_whole = gathering.takes_all and not self._is_cut

    def _run(self, compiled: bool) -> Window:
        state = self._state
        first = run_pass(
            self._cut,
            self._gather,
            state.non_trainable,
            given=None,
            own=None,
            merge=_merged_seen,
            nothing=partial(jax.tree.map, jnp.zeros_like),
            compiled=compiled,
        )
        whole = self._differentiate_loss(first)
        non_trainable, metrics = whole.state
        sums = Sums(whole.losses, whole.gradients, first.sums.moments, [])
        if self._is_seen_whole and not state.trainable:
            return Window(sums, whole.state, whole.latest, first.kept)
        second = run_pass(
            self._cut,
            self._add_again,
            (state.non_trainable, metrics),
            given=(whole.of_added, first.sums.counted),
            own=whole.of_predictions,
            merge=self._merged,
            nothing=self._nothing,
            compiled=compiled,
        )
        (loss, *tracked), (cut_loss, *cut) = whole.losses, second.sums.losses or [0.0]
        sums = sums._replace(
            losses=[loss + cut_loss, *self._window.tracked(tracked, cut)],
            gradients=merged_gradients(
                whole.gradients, second.sums.gradients, self._window.overwritten, jnp.maximum
            ),
        )
        latest = whole.latest | second.latest
        return Window(sums, (non_trainable, second.state[1]), latest, first.kept)

    def told(self, kept: list[Any], loss: Any) -> Any:
        """See `WindowRun`. The entry says whether each micro-batch's predictions are finite."""
        found = [_nan_or_0(_predictions(arrays)) for arrays in kept]
        return loss, super().told(found, loss)

    def _gather(self, batch: Any, rows: int, before: Any, given: None, own: None) -> Step:
        """The first forward pass of one micro-batch."""
        del given, own
        window, functions, state = self._window, self._functions, self._state
        here = Rows(rows, window.rows, self._stretch(batch))
        with recorded_moments(window.batchnorm) as seen:
            y_pred, after, losses = functions.forward(batch[0], state.trainable, before)
        with losses_of(self._model, losses or []), functions.scope(state.trainable, after):
            added = window.added(here, partial(functions.added_shapes, batch[0]))
            counted = window.weights(batch, y_pred, here) if self._is_cut else None
        self._called = [layer for layer, _ in seen]
        moments = jax.tree.map(jnp.asarray, [found for _, found in seen])
        kept = self._rows.padded(window.arrays(batch, y_pred, here))
        return Step(_Seen(added, counted, moments), after, {}, kept)

    def _differentiate_loss(self, first: Window) -> _Whole:
        """Computes the loss and the metrics of all rows."""
        model, window, functions = self._model, self._window, self._functions
        state, batch, kept = self._state, self._batch, first.kept

        def objective(floats: Any, added: list[Any], trainable: list[Any]) -> tuple[Any, Any]:
            arrays = [_with_floats(*pair) for pair in zip(kept, floats, strict=True)]
            y_pred = window.joined(self._rows.joined(arrays))
            with (
                losses_of(model, []),
                functions.scope(trainable, first.state, state.metrics) as scope,
            ):
                loss, tracked = window.loss_of_all_rows(batch, y_pred, added)
            if window.unreduced:
                # Raises JAX' own error, as for the whole batch.
                jax.grad(lambda _: jnp.broadcast_to(loss, (window.rows,)))(0.0)
            return functions.scaled(loss), ([loss, *tracked], functions.changed(scope))

        floats = [_floats(_predictions(arrays)) for arrays in kept]
        scaled, differentiate, (losses, after) = jax.vjp(
            objective, floats, first.sums.added, state.trainable, has_aux=True
        )
        of_predictions, of_added, gradients = differentiate(jnp.ones_like(scaled))
        shown = self._rows.joined(kept)
        if not self._rows.is_packed:
            # On JAX, Keras shows metrics no mask. Packed rows keep theirs: without it, metrics
            # would count padding.
            shown = [*_predictions(shown), *(None for _ in _predictions(shown))]
        with functions.scope(state.trainable, *after) as scope:
            latest = window.update_metrics_of_all_rows(batch, window.joined(shown))
        wide = [gradient.astype(wide_dtype(gradient)) for gradient in gradients]
        return _Whole(losses, wide, of_predictions, of_added, functions.changed(scope), latest)

    def _add_again(self, batch: Any, rows: int, before: Any, given: Any, own: list[Any]) -> Step:
        """Forward and backward of one micro-batch, as a part of the loss of all rows."""
        model, window, functions = self._model, self._window, self._functions
        of_added, counted = given
        here = Rows(rows, window.rows, self._stretch(batch))

        def objective(trainable: list[Any]) -> tuple[Any, Any]:
            y_pred, non_trainable, losses = functions.forward(batch[0], trainable, before[0])
            with (
                losses_of(model, losses or []),
                functions.scope(trainable, non_trainable, before[1]) as scope,
            ):
                added = window.added(here, partial(functions.added_shapes, batch[0]))
                loss, tracked = window.cut_loss(batch, y_pred, here, lambda: counted)
                latest = window.update_metrics(batch, self._shown(y_pred), here)
            predictions = _floats(self._rows.padded(window.predictions(y_pred)))
            losses = [] if loss is None else [loss, *tracked]
            scaled = [functions.scaled(loss) for loss in losses[:1]]
            return (predictions, added, scaled), (losses, functions.changed(scope), latest)

        products, differentiate, aux = jax.vjp(objective, self._state.trainable, has_aux=True)
        losses, after, latest = aux
        cotangents = (own, of_added, [jnp.ones_like(scaled) for scaled in products[2]])
        (gradients,) = differentiate(jax.tree.map(partial(self._upstream, here), cotangents))
        gradients = [self._widened(gradient, here) for gradient in gradients]
        return Step(Sums(losses, gradients, [], []), after, latest, None)

    def _shapes(self, batch: Any, rows: int) -> Arrays:
        """The arrays that are kept of a micro-batch; only their shapes are used."""
        state, window = self._state, self._window
        y_pred, _, _ = self._functions.forward(batch[0], state.trainable, state.non_trainable)
        return window.arrays(batch, y_pred, Rows(rows, window.rows))


def _merged_seen(a: _Seen, b: _Seen) -> _Seen:
    added, counted = jax.tree.map(jnp.add, (a.added, a.counted), (b.added, b.counted))
    return _Seen(added, counted, [tuple(found) for found in merged(a.moments, b.moments)])


def _predictions(arrays: Arrays) -> Arrays:
    """The predictions among the kept arrays. Their masks are the second half."""
    return arrays[: len(arrays) // 2]


def _is_float(array: Any) -> bool:
    return array is not None and jnp.issubdtype(array.dtype, jnp.inexact)


def _floats(predictions: Arrays) -> list[Any]:
    """The predictions of a floating dtype, which have a gradient."""
    return [array for array in predictions if _is_float(array)]


def _nan_or_0(predictions: Arrays) -> Any:
    """For each micro-batch of a segment: 0 if all of its predictions are finite, else NaN."""
    finite = [jnp.isfinite(found).reshape(len(found), -1).all(1) for found in _floats(predictions)]
    return jnp.where(jnp.all(jnp.stack(finite), 0), jnp.float32(0), jnp.float32(jnp.nan))


def _with_floats(arrays: Arrays, floats: Sequence[Any]) -> list[Any]:
    """The kept arrays, with the given values in place of the predictions that have a gradient."""
    values = iter(floats)
    predictions = [next(values) if _is_float(found) else found for found in _predictions(arrays)]
    return [*predictions, *arrays[len(predictions) :]]
