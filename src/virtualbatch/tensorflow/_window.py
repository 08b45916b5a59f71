"""One window: each micro-batch's share of the loss and gradients, and the sums of these shares."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.tensorflow._aux import WindowAux, check_traceable
from virtualbatch.tensorflow._gradients import (
    add,
    check_same_dtype,
    finished,
    loss_dtype,
    scalar_terms,
    scaled_gradients,
    selected_loss,
    split_sparse,
    watch_tensors,
)
from virtualbatch.tensorflow._keras_losses import traced_anew, undivided
from virtualbatch.tensorflow._loop import Output, fold, trace
from virtualbatch.tensorflow._numerics import explained_numerics
from virtualbatch.tensorflow._replicas import replicas, summed, summed_gradients
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.tensorflow._stats import counted, part_of, stats_of
from virtualbatch.tensorflow._weights import window_shares
from virtualbatch.window.shares import Shares, check_counted
from virtualbatch.window.terms import GivenWeight, loss_and_aux, loss_terms


class _Micro(NamedTuple):
    """The results of one micro-batch.

    Fields:
        loss: the micro-batch's share of the loss.
        norm: its part of the statistics; None if they are not asked for.
        dense: its share of dense gradients.
        sparse: values and indices of its share of sparse gradients.
        aux: its aux, unchanged.
    """

    loss: Any
    norm: Any
    dense: list[Any]
    sparse: list[Any]
    aux: Any


class Program(NamedTuple):
    """The arguments of `value_and_gradients`, except the batch and its size.

    Fields:
        loss_fn: micro-batch -> loss, or (loss, aux).
        variables: nested structure of the variables to differentiate with respect to.
        weight: micro-batch -> weight, "sum", or None.
        has_aux: whether `loss_fn` returns aux.
        stats: whether the statistics of the window are returned too.
    """

    loss_fn: Callable[[Any], Any]
    variables: Any
    weight: GivenWeight
    has_aux: bool
    stats: bool

    def converted(self) -> "Program":
        """The same program. AutoGraph converts its functions if it converts the caller.

        AutoGraph does not convert this library, but it must still convert the user's functions.
        """
        if tf.executing_eagerly():
            return self
        autograph = tf.__internal__.autograph
        status = autograph.control_status_ctx()
        weight = self.weight
        loss_fn = self.loss_fn if replicas() == 1 else traced_anew(self.loss_fn)
        return self._replace(
            loss_fn=autograph.tf_convert(loss_fn, status),
            weight=autograph.tf_convert(weight, status) if callable(weight) else weight,
        )

    def run(
        self,
        cut: Sequence[Segment],
        shares: Shares | None = None,
        losses: list[dict[Any, Any]] | None = None,
    ) -> tuple[Any, ...]:
        """Runs a window. If memory runs out, the window is not tried again.

        Args:
            cut: the segments of the window.
            shares: the shares of the window, if they are already known.
            losses: receives, eagerly, for each micro-batch the terms that count, by name.

        Returns:
            (loss or (loss, aux), gradients), and with `stats` the `WindowStats`. If several
            replicas train in step, gradients and leaves of aux with one entry per row are those of
            this replica. All other results are those of all replicas together.
        """
        loss_fn, variables, weight, has_aux, stats = self
        is_one = replicas() == 1
        flat_variables = tf.nest.flatten(variables)
        if shares is None:
            shares = window_shares(cut, weight)
        if stats:
            check_counted(shares)
        several = shares.terms is not None and len(shares.terms) > 1
        dtypes: list[tf.DType] = []

        def micro(index: Any, microbatch: Any) -> _Micro:
            with explained_numerics(shares, index):
                with tf.GradientTape(persistent=several) as tape:
                    watch_tensors(tape, flat_variables)
                    with nullcontext() if is_one else undivided():
                        loss, aux = loss_and_aux(loss_fn(microbatch), has_aux)
                    if has_aux and not tf.executing_eagerly():
                        check_traceable(aux)
                    named = loss_terms(loss)
                    terms = scalar_terms(named.values())
                dtypes.append(loss_dtype(terms))
                check_same_dtype(dtypes)
                parts = shares.of(list(named), index)
                may_be_empty = shares.terms is not None
                gradients = scaled_gradients(tape, terms, parts, flat_variables, may_be_empty)
                if not is_one:
                    _set_shapes(gradients, flat_variables)
            norm = part_of(gradients, shares.of_rows_or_term()[index]) if stats else None
            if losses is not None:
                there = zip(named, terms, parts, strict=True)
                losses.append({n: x for n, x, part in there if part or not may_be_empty})
            loss = selected_loss(terms, parts, may_be_empty)
            return _Micro(loss, norm, *split_sparse(gradients), aux)

        traced = trace(cut, micro)
        aux = WindowAux(loss_fn, cut, traced, shares, is_one) if has_aux else None

        def route(index: Any, found: _Micro) -> Output:
            sums, rows = aux.route(index, found.aux) if aux else ([], [])
            return Output([found.loss, found.norm, *found.dense, *sums], [*found.sparse, *rows])

        sums, rows = fold(traced, route, add)
        count = len(flat_variables)
        flat = finished(sums[2 : 2 + count], rows[: 2 * count], flat_variables)
        gradients = tf.nest.pack_sequence_as(variables, flat)
        microbatches = counted(shares) if stats else None
        whole = [sums[0], sums[1], microbatches, *sums[2 + count :]]
        if not is_one:
            whole = _of_all_replicas(whole)
        loss, norm, microbatches, *of_aux = whole
        loss = tf.cast(loss, dtypes[0])
        value = (loss, aux.result(of_aux, rows[2 * count :])) if aux else loss
        if stats:
            found = flat if is_one else summed_gradients(flat)
            return value, gradients, stats_of(found, shares.window, microbatches, norm)
        return value, gradients


def _of_all_replicas(values: Sequence[Any]) -> list[Any]:
    """Values summed over all replicas, in one reduction. None stays None."""
    found = iter(summed([value for value in values if value is not None]))
    return [None if value is None else next(found) for value in values]


def _set_shapes(gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Sets shapes of gradients that a trace does not know.

    A replica without rows returns zeros in these shapes.
    """
    for gradient, variable in zip(gradients, variables, strict=True):
        if isinstance(gradient, tf.IndexedSlices):
            gradient.values.set_shape([None, *variable.shape[1:]])
        elif gradient is not None:
            gradient.set_shape(variable.shape)
