"""A compiled Keras loss as sums over a micro-batch, each divided by its window's weight.

Keras divides every loss by a denominator of its own: elements, unmasked elements, or sample
weights. Here the same `Loss` objects run with `reduction="sum"`, and the denominator is that of
the whole batch, so the contributions of all micro-batches add up to what Keras would compute.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops
from keras.src import backend
from keras.src.losses.loss import apply_mask

_MEANS = ("sum_over_batch_size", "mean")


class Rows(NamedTuple):
    """Rows of a micro-batch and of its window.

    Fields:
        here: rows of the micro-batch; int or integer scalar.
        window: rows of the whole batch; int or integer scalar.
    """

    here: Any
    window: Any

    def share(self, dtype: str) -> Any:
        """here / window as a scalar of the given dtype, formed in float64."""
        return ops.cast(ops.cast(self.here, "float64") / ops.cast(self.window, "float64"), dtype)


class Contribution(NamedTuple):
    """What a micro-batch adds to the loss of its window.

    Fields:
        total: scalar of the loss's dtype, weighted by `loss_weights`.
        tracked: values for the per-output loss metrics, in their order; empty if Keras keeps none.
        tracked_by_rows: whether Keras weights those metrics by rows (it does where the number of
            rows is static).
        counted: float64 vector with the weight of each term, 0 where it is not counted.
        needs_count: whether any term's weight had to be counted.
    """

    total: Any
    tracked: list[Any]
    tracked_by_rows: bool
    counted: Any
    needs_count: bool


def contribution(
    compile_loss: Any,
    y: Any,
    y_pred: Any,
    sample_weight: Any,
    rows: Rows,
    totals: Callable[[], Any],
) -> Contribution:
    """Runs a model's compiled loss on one micro-batch.

    Keras' own object resolves structures, paths and loss weights; only its terms are replaced, in
    a copy, so the model's object is built if it was not and otherwise left alone.

    Args:
        compile_loss: the model's `CompileLoss`.
        y: targets of the micro-batch, as Keras passes them.
        y_pred: predictions of the micro-batch.
        sample_weight: sample weights of the micro-batch, or None.
        rows: rows of the micro-batch and the window.
        totals: returns the window's weights, a float64 vector with one entry per term; called
            only where a weight has to be counted.

    Returns:
        The contribution.
    """
    counts: list[Any] = []
    metrics: list[_Recorded] = []
    run = _shallow_copy(compile_loss)

    def adopt() -> None:
        entries = compile_loss._flat_losses
        run._flat_losses = [
            entry._replace(loss=_summed(entry.loss, k, rows, totals, counts))
            for k, entry in enumerate(entries)
        ]
        metrics.extend(_Recorded() for _ in compile_loss.metrics)
        run._metrics = metrics
        run._y_pred_build_structure = compile_loss._y_pred_build_structure
        run._y_true_build_structure = compile_loss._y_true_build_structure
        run.built = True

    def build(y_true: Any, y_pred: Any) -> None:
        compile_loss.build(y_true, y_pred)
        adopt()

    if compile_loss.built:
        adopt()
    else:
        run.build = build
    total = run(y, y_pred, sample_weight)
    seen = [metric for metric in metrics if metric.value is not None]
    return Contribution(
        total=total,
        tracked=[metric.value for metric in seen],
        tracked_by_rows=any(metric.sample_weight is not None for metric in seen),
        counted=ops.stack([ops.zeros((), "float64") if c is None else c for c in counts]),
        needs_count=any(c is not None for c in counts),
    )


def _shallow_copy(instance: Any) -> Any:
    """A copy that shares every attribute; Keras' own copies go through a saved config."""
    twin = object.__new__(type(instance))
    vars(twin).update(vars(instance))
    return twin


class _Recorded:
    """Stands where Keras updates a per-output loss metric, which happens once per window."""

    value: Any = None
    sample_weight: Any = None

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        self.value, self.sample_weight = value, sample_weight


def _summed(
    loss: keras.losses.Loss, k: int, rows: Rows, totals: Callable[[], Any], counts: list[Any]
) -> Callable[..., Any]:
    def term(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        total, values, weight = _total_and_weight(loss, y_true, y_pred, sample_weight)
        counts.append(None if weight is None else ops.cast(weight, "float64"))
        if weight is not None:
            return ops.divide_no_nan(total, ops.cast(totals()[k], total.dtype))
        if values is None:
            return _part_of_mean(total, rows)
        if loss.reduction == "sum":
            return total
        per_row = ops.cast(ops.size(values), "float64") / ops.cast(rows.here, "float64")
        return total / ops.cast(per_row * ops.cast(rows.window, "float64"), total.dtype)

    return term


def _part_of_mean(value: Any, rows: Rows) -> Any:
    """A mean over rows as this micro-batch's part of it.

    Keras sums the gradients of a loss that is not reduced, but logs its mean; so does this.
    """
    part = ops.mean(value) * rows.share(value.dtype)
    if len(value.shape) == 0:
        return part
    total = ops.sum(value)
    return total + ops.stop_gradient(part - total)


def _total_and_weight(
    loss: keras.losses.Loss, y_true: Any, y_pred: Any, sample_weight: Any
) -> tuple[Any, Any, Any]:
    """Runs one loss.

    Returns:
        (total, values, weight). `values` are the loss elements that were summed to `total`, or
        None if the loss is a mean over rows as it stands: it returned a scalar, is not reduced,
        or computes its reduction itself. `weight` is what Keras divides by where that has to be
        counted, or None where it is proportional to the rows.
    """
    if type(loss).__call__ is not keras.losses.Loss.__call__ or loss.reduction in (None, "none"):
        return loss(y_true, y_pred, sample_weight), None, None
    seen: list[Any] = []

    def call(y_true: Any, y_pred: Any) -> Any:
        seen.append(loss.call(y_true, y_pred))
        return seen[0]

    run = _shallow_copy(loss)
    run.call = call
    run.reduction = "sum"
    total = run(y_true, y_pred, sample_weight)
    values = seen[0]
    if len(values.shape) == 0:
        return total, None, None
    if loss.reduction == "sum":
        return total, values, None
    mask = _mask(y_pred, values)
    if loss.reduction in _MEANS:
        if mask is None:
            return total, values, None
        valid = ops.sum(ops.cast(mask, loss.dtype))
        if tuple(values.shape) != tuple(mask.shape):
            ratio = ops.cast(ops.size(values), "float64") / ops.cast(ops.size(mask), "float64")
            valid = valid * ops.cast(ratio, loss.dtype)
        return total, values, valid
    weights = apply_mask(
        None if sample_weight is None else ops.convert_to_tensor(sample_weight, loss.dtype),
        mask,
        dtype=loss.dtype,
        reduction=loss.reduction,
    )
    return total, values, None if weights is None else ops.sum(weights)


def _mask(y_pred: Any, values: Any) -> Any:
    """The mask that Keras applies: that of the predictions and that which the loss attached."""
    given = [backend.get_keras_mask(y_pred), backend.get_keras_mask(values)]
    found = [ops.cast(mask, "bool") for mask in given if mask is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else ops.logical_and(*found)
