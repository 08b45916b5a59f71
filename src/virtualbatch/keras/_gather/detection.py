"""Finds which losses of a compiled model need all rows, by their type, shape and values.

If a loss returns one value per row and reads no other row, its values do not change when the batch
is cut into two halves. So a few rows are predicted once, and the losses are called on all of these
rows and on both halves. The model does not change. If types alone give the answer, nothing runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.src import backend

from virtualbatch.keras._certify.keras_own import couples_rows, is_own_of_rows, losses_of
from virtualbatch.keras._certify.step import chosen, tensors
from virtualbatch.keras._gather.gathering import (
    COMPARES,
    EVERYTHING,
    NO_ROWS,
    NOTHING,
    NUMBER,
    UNCUT,
    Coupled,
    Found,
    Gathering,
)
from virtualbatch.keras._terms import Recorded, elements, with_other_losses

# Enough rows for pairs in each of two halves, and few enough for a cheap forward.
_ROWS = 16
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

# (model, function of arrays, arrays) -> the function's result: a list of NumPy arrays and Nones.
Evaluate = Callable[[keras.Model, Callable[[Any], Any], Any], Sequence[Any]]


def found_on_rows(model: keras.Model, batch: Any, rows: int, evaluate: Evaluate) -> Found:
    """The losses that need all rows, found from the first rows of a batch.

    Args:
        model: a compiled model. Its layers are built and its variables hold their values.
        batch: (x, y, sample_weight); every array has values.
        rows: its rows, at least 2.
        evaluate: runs a function in a scope, so that assignments do not reach the model.
    """
    if _overrides_compute_loss(model):
        return Found([], EVERYTHING, _run_by_loss(model, batch))
    if _is_told_by_type(model):
        return NOTHING
    count = min(rows, _ROWS) // 2 * 2
    x, y = (tensors(chosen(part, np.arange(count))) for part in batch[:2])
    predictions = _Predictions()
    arrays = evaluate(model, lambda x: predictions.taken(_in_inference(model, x)), x)
    compile_loss = model._compile_loss
    if not compile_loss.built:
        compile_loss.build(y, predictions.given_back(arrays))
    halves = [range(count), range(count // 2), range(count // 2, count)]
    # A loss may compare only rows with the same target, so try targets that repeat too.
    paired = tensors(chosen(y, np.arange(count) % (count // 2)))
    failed: set[int] = set()
    order: list[tuple[int, int]] = []

    def values(given: Any) -> list[Any]:
        targets, arrays = given
        found = []
        order.clear()
        for number, (which, part) in enumerate((k, part) for k in (0, 1) for part in halves):
            y_true = chosen(targets[which], np.asarray(part))
            y_pred = predictions.given_back([_some(array, part) for array in arrays])
            for k, value in _values(compile_loss, y_true, y_pred, failed):
                order.append((number, k))
                found.append(value)
        return found

    flat = evaluate(model, values, ((y, paired), arrays))
    by_loss: dict[int, dict[int, np.ndarray]] = {}
    for (number, k), value in zip(order, flat, strict=True):
        by_loss.setdefault(k, {})[number] = value
    return _found(
        model,
        {
            k: _why(compile_loss._flat_losses[k].loss, by_loss.get(k, {}), count, k in failed)
            for k in {*by_loss, *failed}
        },
    )


def found_by_shape(model: keras.Model, batch: Any) -> Found:
    """The losses that need all rows, as far as types and shapes show.

    Args:
        model: a compiled model; its layers are built.
        batch: (x, y, sample_weight), perhaps without values.
    """
    if _overrides_compute_loss(model):
        return Found([], EVERYTHING)
    if _is_told_by_type(model):
        return NOTHING
    x, y = (tree.map_structure(_symbol, part) for part in batch[:2])
    y_pred = backend.compute_output_spec(lambda x: _in_inference(model, x), x)
    compile_loss = model._compile_loss
    if not compile_loss.built:
        compile_loss.build(y, y_pred)
    ranks: dict[int, int] = {}

    def look(y: Any, y_pred: Any) -> Any:
        ranks.update((k, len(value.shape)) for k, value in _values(compile_loss, y, y_pred, set()))
        return y_pred

    backend.compute_output_spec(look, y, y_pred)
    coupled: dict[int, Coupled | None] = {}
    for k, entry in enumerate(compile_loss._flat_losses):
        if ranks.get(k) == 0:
            coupled[k] = Coupled(entry.loss.name, NUMBER)
        elif couples_rows(entry.loss):
            coupled[k] = Coupled(entry.loss.name, COMPARES)
    return _found(model, coupled)


def found_as_asked(
    model: keras.Model, batch: Any, rows: int, evaluate: Evaluate, gather: bool | Found | None
) -> Found:
    """The losses that need all rows and get them, under a `gather` setting.

    Args:
        model: see `found_on_rows`.
        batch: see `found_on_rows`.
        rows: the rows of the batch; may be 1.
        evaluate: see `found_on_rows`.
        gather: the setting of `accumulate`, or an earlier result, which is returned.
    """
    if isinstance(gather, Found):
        return gather
    if gather is None:
        return NOTHING if rows < 2 else found_on_rows(model, batch, rows, evaluate)
    return Found([], EVERYTHING) if gather else NOTHING


def _overrides_compute_loss(model: keras.Model) -> bool:
    return type(model).compute_loss is not keras.Model.compute_loss


def _run_by_loss(model: keras.Model, batch: Any) -> list[str]:
    """Names of layers that an overridden `compute_loss` runs, found from shapes alone."""
    given = tree.map_structure(_symbol, batch)
    layers = model._flatten_layers()
    before = [(layer, vars(layer).get("call")) for layer in layers]
    called: dict[str, None] = {}

    def listening(layer: Any) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            called[layer.name] = None
            return type(layer).call(layer, *args, **options)

        return call

    def loss(x: Any, y: Any, sample_weight: Any) -> Any:
        y_pred = _in_inference(model, x)
        for layer in layers:
            vars(layer)["call"] = listening(layer)
        return model._compute_loss(x, y, y_pred, sample_weight, training=True)

    try:
        backend.compute_output_spec(loss, *given)
    except Exception:  # the user's code may need values
        return []
    finally:
        for layer, own in before:
            vars(layer).pop("call", None)
            if own is not None:
                vars(layer)["call"] = own
    return list(called)


def _is_told_by_type(model: keras.Model) -> bool:
    """Whether types alone show that no loss needs all rows.

    This holds without a compiled loss, and if all losses are Keras' own and give each row a value.
    Predictions must have at least two axes: with one axis, a loss would reduce the rows.
    """
    if model._compile_loss is None:
        return True
    outputs = getattr(model, "outputs", None) or []
    ranks = [len(output.shape) for output in tree.flatten(outputs)]
    return bool(ranks) and min(ranks) > 1 and all(map(is_own_of_rows, losses_of(model)))


def _in_inference(model: keras.Model, x: Any) -> Any:
    return model(x, training=False) if model._call_has_training_arg else model(x)


class _Predictions:
    """Predictions as a list of arrays and masks, and back."""

    def __init__(self) -> None:
        self._structure: Any = None

    def taken(self, y_pred: Any) -> list[Any]:
        self._structure = tree.map_structure(lambda _: 0, y_pred)
        leaves = tree.flatten(y_pred)
        return [*leaves, *map(backend.get_keras_mask, leaves)]

    def given_back(self, arrays: Sequence[Any]) -> Any:
        leaves = [ops.convert_to_tensor(leaf) for leaf in arrays[: len(arrays) // 2]]
        for leaf, mask in zip(leaves, arrays[len(arrays) // 2 :], strict=True):
            if mask is not None:
                backend.set_keras_mask(leaf, ops.convert_to_tensor(mask))
        return tree.pack_sequence_as(self._structure, leaves)


def _some(array: Any, rows: range) -> Any:
    return None if array is None else array[rows.start : rows.stop]


def _symbol(leaf: Any) -> Any:
    if not hasattr(leaf, "shape"):
        return leaf
    return keras.KerasTensor(leaf.shape, backend.standardize_dtype(leaf.dtype))


def _values(compile_loss: Any, y: Any, y_pred: Any, failed: set[int]) -> list[tuple[int, Any]]:
    """(index, unreduced values) of each compiled loss. Indices of failing losses go to `failed`."""
    found: list[tuple[int, Any]] = []

    def looked_at(k: int, loss: keras.losses.Loss) -> Callable[..., Any]:
        reduced = type(loss).__call__ is not keras.losses.Loss.__call__

        def look(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            del sample_weight
            try:
                value = loss(y_true, y_pred) if reduced else elements(loss, y_true, y_pred, None)[0]
            except Exception:  # the user's code may not work on these rows
                failed.add(k)
            else:
                found.append((k, value))
            return ops.zeros(())

        return look

    def other(entries: Sequence[Any]) -> Sequence[Any]:
        return [entry._replace(loss=looked_at(k, entry.loss)) for k, entry in enumerate(entries)]

    metrics: list[Recorded] = []
    with_other_losses(compile_loss, other, metrics)(y, y_pred, None)
    return found


def _why(loss: Any, values: dict[int, np.ndarray], rows: int, failed: bool) -> Coupled | None:
    """Why a loss needs all rows, if it does.

    Args:
        loss: the loss.
        values: its values for all rows (0), the first half (1) and the second half (2); 3 to 5 are
            the same with targets that repeat.
        rows: the number of rows.
        failed: whether the loss raised for some of these.
    """
    if failed:
        return Coupled(loss.name, UNCUT)
    if values[0].ndim == 0:
        return Coupled(loss.name, NUMBER)
    if values[0].shape[0] != rows or values[1].shape[0] != rows // 2:
        return Coupled(loss.name, NO_ROWS)
    differs = max(_differs(*(values[start + k] for k in range(3))) for start in (0, 3))
    if differs > 64 * rows * _EPSILON[loss.dtype] or couples_rows(loss):
        return Coupled(loss.name, COMPARES, differs)
    return None


def _differs(whole: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """The largest change of a value when the rows are cut in halves, over the largest value."""
    whole, parts = whole.astype("float64"), np.concatenate([first, second]).astype("float64")
    finite = np.isfinite(whole)
    if np.any(finite != np.isfinite(parts)):
        return np.inf
    # Values that are not finite show nothing.
    size = np.max(np.abs(whole[finite]), initial=0.0)
    off = np.max(np.abs(whole[finite] - parts[finite]), initial=0.0)
    return float(off / size) if size else 0.0


def _found(model: keras.Model, coupled: dict[int, Coupled | None]) -> Found:
    """The losses that need all rows, and which predictions are gathered for them."""
    entries = model._compile_loss._flat_losses
    structure = model._compile_loss._y_pred_build_structure
    flags = [coupled.get(k) is not None for k in range(len(entries))]
    if not tree.is_nested(structure):
        # Keras trains on the first of several losses of one output.
        flags = [flags[0]] * len(flags)
    if not any(flags):
        return NOTHING
    count = len(tree.flatten(structure))
    numbers = tree.pack_sequence_as(structure, list(range(count)))
    taken: set[int] = set()
    for entry, there in zip(entries, flags, strict=True):
        if there:
            found = numbers
            for key in entry.path:
                found = found[key]
            taken.update(tree.flatten(found))
    needed = [found for k, found in sorted(coupled.items()) if found is not None and flags[k]]
    return Found(needed, Gathering(flags, [k in taken for k in range(count)]))


def evaluated_eagerly(
    model: keras.Model, function: Callable[[Any], Any], given: Any
) -> Sequence[Any]:
    """See `Evaluate`; for backends that can run the function eagerly."""
    del model
    with keras.StatelessScope():
        return [None if found is None else ops.convert_to_numpy(found) for found in function(given)]
