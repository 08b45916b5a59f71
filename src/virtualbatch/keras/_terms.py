"""A compiled Keras loss as sums over a micro-batch, each divided by its window's weight.

Keras divides every loss by its own denominator: the number of elements or of unmasked elements, or
the sum of sample weights. Here the same `Loss` objects run without their reduction, and we divide
by the denominator of the whole batch. So the contributions of all micro-batches add up to what
Keras would compute for the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import ops
from keras.src import backend
from keras.src.losses.loss import apply_mask

from virtualbatch.keras._rows import Rows


class Contribution(NamedTuple):
    """What a micro-batch adds to the loss of its window.

    Fields:
        total: a scalar of the loss's dtype, weighted by `loss_weights`.
        tracked: values for the per-output loss metrics, in their order; empty if Keras keeps no
            such metrics.
        tracked_by_rows: whether Keras weights those metrics by rows. It does if the number of rows
            is static.
        counted: the weights of this micro-batch that depend on its data or on a forward, as a
            vector of float32 or wider. None if every weight is proportional to the rows.
        numbers: names of losses that returned one number rather than one value per row.
        unreduced: whether the loss is one that Keras does not reduce. Its gradients are summed.
    """

    total: Any
    tracked: list[Any]
    tracked_by_rows: bool
    counted: Any
    numbers: list[str]
    unreduced: bool

    @property
    def needs_count(self) -> bool:
        """Whether any weight had to be counted."""
        return self.counted is not None


class Recorded:
    """Stands in for a per-output loss metric, whose real update happens once per window."""

    value: Any = None
    sample_weight: Any = None

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        """Keeps the values that the metric would get."""
        self.value, self.sample_weight = value, sample_weight


def contribution(
    compile_loss: Any,
    y: Any,
    y_pred: Any,
    sample_weight: Any,
    rows: Rows,
    totals: Callable[[], Any],
    skipped: Sequence[bool] = (),
) -> Contribution:
    """Runs a model's compiled loss on one micro-batch.

    A copy of Keras' own object resolves structures, paths and loss weights. Only the terms of the
    copy are replaced. The model's object is built if it was not, and is otherwise unchanged.

    Args:
        compile_loss: the model's `CompileLoss`.
        y: targets of the micro-batch, as Keras passes them.
        y_pred: predictions of the micro-batch.
        sample_weight: sample weights of the micro-batch, or None.
        rows: rows of the micro-batch and the window.
        totals: returns the `counted` vectors of all micro-batches of the window, summed, or floats
            that stand for that sum. It is called only if a weight has to be counted.
        skipped: for each loss of a built `compile_loss`, whether to leave it out. If empty, no
            loss is left out.

    Returns:
        The contribution.

    Raises:
        ValueError: one of several losses has `reduction=None`.
    """
    counts: list[Any] = []
    notes = _Notes([])

    def over_window(value: Any) -> Any:
        counts.append(value)
        total = totals()[len(counts) - 1]
        return total if isinstance(total, float) else ops.cast(total, value.dtype)

    def summed(entries: Sequence[Any]) -> Sequence[Any]:
        _check_reduced(entries)
        skips = skipped or [False] * len(entries)
        return [
            entry._replace(loss=_summed(entry.loss, rows, over_window, notes))
            for entry, skip in zip(entries, skips, strict=True)
            if not skip
        ]

    metrics: list[Recorded] = []
    run = with_other_losses(compile_loss, summed, metrics)
    total = run(y, y_pred, sample_weight)
    seen = [metric for metric in metrics if metric.value is not None]
    return Contribution(
        total=total,
        tracked=[metric.value for metric in seen],
        tracked_by_rows=any(metric.sample_weight is not None for metric in seen),
        counted=_vector(counts) if counts else None,
        numbers=notes.numbers,
        unreduced=notes.unreduced,
    )


def with_other_losses(
    compile_loss: Any, other: Callable[[Sequence[Any]], Sequence[Any]], metrics: list[Recorded]
) -> Any:
    """A copy of a `CompileLoss` that computes other entries and updates no metric.

    Args:
        compile_loss: the model's own object. It is built if it was not, and is otherwise unchanged.
        other: entries of the original -> entries of the copy.
        metrics: a list that gets one `Recorded` per entry of the copy, if Keras keeps metrics.
    """
    run = shallow_copy(compile_loss)

    def adopt() -> None:
        run._flat_losses = other(compile_loss._flat_losses)
        metrics.extend(Recorded() for _ in run._flat_losses if compile_loss.metrics)
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
    return run


def _check_reduced(entries: Sequence[Any]) -> None:
    """Refuses an unreduced loss among several losses.

    Keras would add them by broadcasting, so one loss would count once per row of another.

    Raises:
        ValueError: one of several losses is not reduced.
    """
    unreduced = [entry.name for entry in entries if _is_unreduced(entry.loss)]
    if unreduced and len(entries) > 1:
        raise ValueError(
            "Each of several losses must be reduced to a number of its own. "
            f"Got reduction=None for {', '.join(map(str, unreduced))}. "
            'Use reduction="sum", which has the same gradient.'
        )


def shallow_copy(instance: Any) -> Any:
    """A copy that shares every attribute. Keras' own copies go through a saved config instead."""
    twin = object.__new__(type(instance))
    vars(twin).update(vars(instance))
    return twin


def _vector(counts: Sequence[Any]) -> Any:
    dtype = keras.backend.result_type("float32", *(count.dtype for count in counts))
    return ops.stack([ops.cast(count, dtype) for count in counts])


@dataclass
class _Notes:
    """Facts about the losses that are known only when they run."""

    numbers: list[str]
    unreduced: bool = False


def _summed(
    loss: keras.losses.Loss,
    rows: Rows,
    over_window: Callable[[Any], Any],
    notes: "_Notes",
) -> Callable[..., Any]:
    """A loss that returns the micro-batch's part of the window's loss.

    Args:
        loss: one loss of a compiled model.
        rows: rows of the micro-batch and the window.
        over_window: scalar of this micro-batch -> its sum over the window.
        notes: receives what the run shows about the loss.

    Returns:
        A function of (y_true, y_pred, sample_weight), like the loss.
    """

    def part(mean: Any) -> Any:
        notes.numbers.append(loss.name)
        return mean * rows.share(mean.dtype)

    def own(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        value = loss(y_true, y_pred, sample_weight)
        if len(value.shape) == 0:
            return part(value)
        notes.unreduced = True
        return logged_as_mean(ops.sum(value), value, rows)

    def term(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        values, mask, product = elements(loss, y_true, y_pred, _copy(sample_weight))
        weights = _weights(loss, mask, _copy(sample_weight))
        if len(values.shape) == 0:
            mean = part(values)
            if weights is None:
                return mean
            # If a loss is one number, Keras broadcasts it over the weights and reduces the result.
            total = mean * over_window(ops.sum(weights))
        else:
            total = ops.sum(product)
        if loss.reduction == "sum":
            return total
        if _is_unreduced(loss):
            notes.unreduced = True
            return logged_as_mean(total, product, rows)
        if loss.reduction == "mean_with_sample_weight" and weights is not None:
            return _divided(total, over_window(ops.sum(weights)))
        if loss.reduction != "mean_with_sample_weight" and mask is not None:
            valid = ops.sum(ops.cast(mask, total.dtype))
            return _divided(total, over_window(valid * _elements_per_position(product, mask)))
        return _divided(total, _size_over_window(product, rows))

    return term if type(loss).__call__ is keras.losses.Loss.__call__ else own


def _copy(sample_weight: Any) -> Any:
    """A copy of sample weights, because on PyTorch Keras multiplies them by a mask in place."""
    return None if sample_weight is None else ops.copy(sample_weight)


def _is_unreduced(loss: keras.losses.Loss) -> bool:
    return loss.reduction in (None, "none")


def logged_as_mean(total: Any, elements: Any, rows: Rows) -> Any:
    """The value of an unreduced loss: Keras sums its gradients but logs its mean."""
    part = _divided(total, _size_over_window(elements, rows))
    return total + ops.stop_gradient(part - total)


def _size_over_window(values: Any, rows: Rows) -> Any:
    """The number of elements in the window, from a micro-batch's elements; a float or a scalar.

    Keras counts padding too. So for a value per token, trimmed padding is counted here.
    """
    stretch = rows.stretch if len(values.shape) > 1 else 1.0
    if rows.on_host and None not in values.shape:
        return math.prod(values.shape) * rows.window / rows.here * stretch
    per_row = ops.cast(ops.size(values), "float64") / ops.cast(rows.here, "float64") * stretch
    return ops.cast(per_row * ops.cast(rows.window, "float64"), values.dtype)


def _elements_per_position(values: Any, mask: Any) -> Any:
    """The number of elements for which one position of the mask stands; a float or a scalar."""
    if None not in values.shape and None not in mask.shape:
        return math.prod(values.shape) / (math.prod(mask.shape) or 1)
    return ops.cast(ops.size(values) / ops.size(mask), values.dtype)


def _divided(total: Any, weight: Any) -> Any:
    """A sum divided by its weight; 0 if the weight is 0."""
    if isinstance(weight, float):
        return total / (weight or 1.0)
    return ops.divide_no_nan(total, weight)


def elements(
    loss: keras.losses.Loss, y_true: Any, y_pred: Any, sample_weight: Any
) -> tuple[Any, Any, Any]:
    """Runs one loss without its reduction.

    Returns:
        (values, mask, product): the values of the loss; the mask that Keras applies, or None; and
        the values multiplied by mask and sample weights.
    """
    seen: list[Any] = []

    def call(y_true: Any, y_pred: Any) -> Any:
        seen.append(loss.call(y_true, y_pred))
        return seen[0]

    run = shallow_copy(loss)
    run.call = call
    run.reduction = None
    product = run(y_true, y_pred, sample_weight)
    return ops.convert_to_tensor(seen[0], loss.dtype), _mask(y_pred, seen[0]), product


def _weights(loss: keras.losses.Loss, mask: Any, sample_weight: Any) -> Any:
    """Mask times sample weights, merged as Keras does; None if there is neither."""
    if sample_weight is not None:
        sample_weight = ops.convert_to_tensor(sample_weight, loss.dtype)
    return apply_mask(sample_weight, mask, dtype=loss.dtype, reduction=None)


def _mask(y_pred: Any, values: Any) -> Any:
    """The mask that Keras applies: the predictions' mask and the mask that the loss attached."""
    given = [backend.get_keras_mask(y_pred), backend.get_keras_mask(values)]
    found = [ops.cast(mask, "bool") for mask in given if mask is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else ops.logical_and(*found)
