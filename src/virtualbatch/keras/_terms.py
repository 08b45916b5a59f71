"""A compiled Keras loss as sums over a micro-batch, each divided by its window's weight.

Keras divides every loss by a denominator of its own: elements, unmasked elements, or sample
weights. Here the same `Loss` objects run without their reduction, and the denominator is that of
the whole batch, so the contributions of all micro-batches add up to what Keras would compute.
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
        total: scalar of the loss's dtype, weighted by `loss_weights`.
        tracked: values for the per-output loss metrics, in their order; empty if Keras keeps none.
        tracked_by_rows: whether Keras weights those metrics by rows (it does where the number of
            rows is static).
        counted: vector, at least float32, of what had to be counted because only the data or a
            forward knows it; None where every weight is proportional to the rows.
        numbers: names of losses that gave one number, rather than one value per row.
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
    """Stands where Keras updates a per-output loss metric, which happens once per window."""

    value: Any = None
    sample_weight: Any = None

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        """Keeps what the metric would be shown."""
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

    Keras' own object resolves structures, paths and loss weights; only its terms are replaced, in
    a copy, so the model's object is built if it was not and otherwise left alone.

    Args:
        compile_loss: the model's `CompileLoss`.
        y: targets of the micro-batch, as Keras passes them.
        y_pred: predictions of the micro-batch.
        sample_weight: sample weights of the micro-batch, or None.
        rows: rows of the micro-batch and the window.
        totals: returns what the micro-batches of the window have `counted`, added up (or floats
            that stand for it); called only where a weight has to be counted.
        skipped: for each loss of a built one, whether it is left out; empty for all.

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
    """A copy of a `CompileLoss` that computes other entries, and updates no metric.

    Args:
        compile_loss: the model's own, which is built if it was not and otherwise left alone.
        other: its entries -> those of the copy.
        metrics: takes what each of these would show its metric, once the copy has run.
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
    """Refuses what Keras adds up by broadcasting, so that one loss counts once per row of another.

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
    """A copy that shares every attribute; Keras' own copies go through a saved config."""
    twin = object.__new__(type(instance))
    vars(twin).update(vars(instance))
    return twin


def _vector(counts: Sequence[Any]) -> Any:
    dtype = keras.backend.result_type("float32", *(count.dtype for count in counts))
    return ops.stack([ops.cast(count, dtype) for count in counts])


@dataclass
class _Notes:
    """What is learned about a loss when it runs."""

    numbers: list[str]
    unreduced: bool = False


def _summed(
    loss: keras.losses.Loss,
    rows: Rows,
    over_window: Callable[[Any], Any],
    notes: "_Notes",
) -> Callable[..., Any]:
    """A loss that gives its micro-batch's part of what it would be for the window.

    Args:
        loss: one loss of a compiled model.
        rows: rows of the micro-batch and the window.
        over_window: scalar of this micro-batch -> its sum over the window.
        notes: takes what is found out about the loss.

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
            # Keras spreads a loss that is a number already over the weights, and reduces that.
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
    """Weights that Keras may multiply by a mask, which it does in place on PyTorch."""
    return None if sample_weight is None else ops.copy(sample_weight)


def _is_unreduced(loss: keras.losses.Loss) -> bool:
    return loss.reduction in (None, "none")


def logged_as_mean(total: Any, elements: Any, rows: Rows) -> Any:
    """A loss that is not reduced: Keras sums its gradients but logs its mean."""
    part = _divided(total, _size_over_window(elements, rows))
    return total + ops.stop_gradient(part - total)


def _size_over_window(values: Any, rows: Rows) -> Any:
    """Number of elements that the window has, from those of a micro-batch; a float or a scalar.

    Keras counts padding too, so what was trimmed of a value per token is counted here.
    """
    stretch = rows.stretch if len(values.shape) > 1 else 1.0
    if rows.on_host and None not in values.shape:
        return math.prod(values.shape) * rows.window / rows.here * stretch
    per_row = ops.cast(ops.size(values), "float64") / ops.cast(rows.here, "float64") * stretch
    return ops.cast(per_row * ops.cast(rows.window, "float64"), values.dtype)


def _elements_per_position(values: Any, mask: Any) -> Any:
    """A position of the mask may stand for several elements; a float or a scalar."""
    if None not in values.shape and None not in mask.shape:
        return math.prod(values.shape) / (math.prod(mask.shape) or 1)
    return ops.cast(ops.size(values) / ops.size(mask), values.dtype)


def _divided(total: Any, weight: Any) -> Any:
    """A sum over its weight, 0 where there is no weight."""
    if isinstance(weight, float):
        return total / (weight or 1.0)
    return ops.divide_no_nan(total, weight)


def elements(
    loss: keras.losses.Loss, y_true: Any, y_pred: Any, sample_weight: Any
) -> tuple[Any, Any, Any]:
    """Runs one loss without its reduction.

    Returns:
        (values, mask, product): what the loss computed, the mask that Keras applies or None, and
        the values times mask and sample weights.
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
    """Mask times sample weights as Keras merges them, or None where there is neither."""
    if sample_weight is not None:
        sample_weight = ops.convert_to_tensor(sample_weight, loss.dtype)
    return apply_mask(sample_weight, mask, dtype=loss.dtype, reduction=None)


def _mask(y_pred: Any, values: Any) -> Any:
    """The mask that Keras applies: that of the predictions and that which the loss attached."""
    given = [backend.get_keras_mask(y_pred), backend.get_keras_mask(values)]
    found = [ops.cast(mask, "bool") for mask in given if mask is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else ops.logical_and(*found)
