"""What a loss function gives beside its loss, put together again for the whole batch.

A leaf with one entry per row is concatenated, an integer leaf is summed, any other is averaged by
rows. Whether a leaf has one entry per row is judged by its shape at two numbers of rows, because
a shape of 10 may be ten rows or ten classes.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._batch import Segment, as_tensor, named_arrays, specs
from virtualbatch.tensorflow._loop import Traced
from virtualbatch.window.shares import accumulator_dtype
from virtualbatch.window.tree import common_rows

_ROWS, _SUM, _MEAN, _NOTHING = "rows", "sum", "mean", "nothing"

# An eager loop asks the same question at every update, and the answer costs a trace.
_shapes: weakref.WeakKeyDictionary[Any, dict[str, list[Any]]] = weakref.WeakKeyDictionary()


class WindowAux:
    """Collects the aux of a window's micro-batches.

    Args:
        loss_fn: returns (loss, aux).
        segments: the window's segments.
        traced: the same with their steps, whose results have a field `aux`.
        shares: part of the window's rows that each micro-batch has.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Any],
        segments: Sequence[Segment],
        traced: Sequence[Traced],
        shares: Any,
    ):
        self._loss_fn = loss_fn
        self._segments = segments
        self._shares = shares
        self._kept: list[Any] = []
        only = segments[0].count
        self._alone = len(segments) == 1 and isinstance(only, int) and only == 1
        self._in_graph = not tf.executing_eagerly() and not self._alone
        if self._in_graph:
            self._structure = traced[0].outputs.aux
            self._kinds = self._traced_kinds()

    def route(self, index: Any, aux: Any) -> tuple[list[Any], list[Any]]:
        """Splits one micro-batch's aux into what is summed and what is concatenated.

        Eagerly, and for a window of one micro-batch, it is kept instead and nothing is returned:
        there the kinds are judged from what all micro-batches gave.
        """
        if self._in_graph:
            return _routed(self._kinds, self._shares[index], aux)
        self._kept.append(aux)
        return [], []

    def result(self, sums: Sequence[Any], rows: Sequence[Any]) -> Any:
        """The aux of the whole batch, from the window's sums and concatenated rows."""
        if self._alone:
            return self._kept[0]
        if not self._in_graph:
            self._structure = self._kept[0]
            self._kinds = self._eager_kinds()
            routed = [
                _routed(self._kinds, share, aux)
                for share, aux in zip(self._shares, self._kept, strict=True)
            ]
            sums = [_total(column) for column in zip(*(s for s, _ in routed), strict=True)]
            rows = [_joined(column) for column in zip(*(r for _, r in routed), strict=True)]
        leaves = [
            row if total is None else _cast_like(total, leaf)
            for total, row, leaf in zip(sums, rows, tf.nest.flatten(self._structure), strict=True)
        ]
        return tf.nest.pack_sequence_as(self._structure, leaves)

    def _traced_kinds(self) -> list[str]:
        microbatch = self._segments[0].get(tf.constant(0))
        leaves = _tensors(self._structure)
        rows = _rows(microbatch)
        per_row = [_has_axis(leaf) and leaf.shape[0] == rows for leaf in leaves]
        if any(per_row):
            # With open rows the trace cannot tell one entry per row from any other open size.
            other = 2 if rows is None else rows + 1
            per_row = self._confirmed(per_row, leaves, specs(microbatch, other), other)
        return [_kind(leaf, found) for leaf, found in zip(leaves, per_row, strict=True)]

    def _eager_kinds(self) -> list[str]:
        microbatches = [segment.get(0) for segment in self._segments]
        rows = [_rows(microbatch) for microbatch in microbatches]
        flat = [_tensors(aux) for aux in self._kept]
        per_row = [
            all(
                _has_axis(leaf) and leaf.shape[0] == n for leaf, n in zip(column, rows, strict=True)
            )
            for column in zip(*flat, strict=True)
        ]
        if any(per_row) and len(set(rows)) == 1:
            other = rows[0] + 1
            microbatch = tf.nest.map_structure(as_tensor, microbatches[0])
            per_row = self._confirmed(per_row, flat[0], specs(microbatch, other), other)
        return [_kind(leaf, found) for leaf, found in zip(flat[0], per_row, strict=True)]

    def _confirmed(
        self, per_row: list[bool], leaves: list[Any], spec: Any, rows: int
    ) -> list[bool]:
        """Which leaves still follow the rows when the loss is traced with another number."""
        known = _known_shapes(self._loss_fn)
        given = [None if leaf is None else (leaf.shape, leaf.dtype) for leaf in leaves]
        key = str((getattr(self._loss_fn, "__name__", None), tf.nest.flatten(spec), given))
        if key not in known:
            known[key] = [
                None if leaf is None else leaf.shape for leaf in self._traced_aux(spec, rows)
            ]
        return [
            found and bool(shape.rank) and shape[0] == rows
            for found, shape in zip(per_row, known[key], strict=True)
        ]

    def _traced_aux(self, spec: Any, rows: int) -> list[Any]:
        traced = tf.function(lambda microbatch: self._loss_fn(microbatch)[1])
        try:
            outputs = traced.get_concrete_function(spec).structured_outputs
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise TypeError(
                "With has_aux=True a loss function must be traceable with any number of rows, "
                "which tells the leaves of aux that have one entry per row. "
                f"Got {type(error).__name__} with {rows} rows: {error}. "
                "Use TensorFlow operations instead of .numpy() and of a fixed number of rows."
            ) from error
        return tf.nest.flatten(outputs)


def _routed(kinds: Sequence[str], share: Any, aux: Any) -> tuple[list[Any], list[Any]]:
    sums: list[Any] = []
    rows: list[Any] = []
    for kind, value in zip(kinds, _tensors(aux), strict=True):
        if kind == _MEAN:
            wide = tf.cast(value, accumulator_dtype(value.dtype.name))
            sums.append(wide * tf.cast(share, wide.dtype))
        else:
            sums.append(value if kind == _SUM else None)
        rows.append(value if kind == _ROWS else None)
    return sums, rows


def _tensors(aux: Any) -> list[Any]:
    """The leaves of aux as dense tensors; None stays None."""
    leaves = tf.nest.flatten(aux)
    for leaf in leaves:
        if isinstance(leaf, tf.RaggedTensor | tf.SparseTensor | tf.IndexedSlices):
            raise TypeError(
                "A leaf of aux must be a dense tensor, a number or None. "
                f"Got {type(leaf).__name__}. Return its dense parts, such as to_tensor()."
            )
    return [None if leaf is None else tf.convert_to_tensor(leaf) for leaf in leaves]


def _known_shapes(loss_fn: Any) -> dict[str, list[Any]]:
    """What was found about aux of this loss function before; empty if it cannot be remembered."""
    # A bound method is a new object at every access, but its instance is not.
    owner = getattr(loss_fn, "__self__", loss_fn)
    try:
        return _shapes.setdefault(owner, {})
    except TypeError:  # not hashable, or without weak references
        return {}


def _total(column: Sequence[Any]) -> Any:
    return None if column[0] is None else tf.add_n(list(column))


def _joined(column: Sequence[Any]) -> Any:
    return None if column[0] is None else tf.concat(list(column), 0)


def _cast_like(total: Any, leaf: Any) -> Any:
    return tf.cast(total, leaf.dtype) if hasattr(leaf, "dtype") else total


def _rows(microbatch: Any) -> Any:
    return common_rows(named_arrays(microbatch))


def _has_axis(leaf: Any) -> bool:
    return leaf is not None and bool(leaf.shape.rank)


def _kind(leaf: Any, per_row: bool) -> str:
    if leaf is None:
        return _NOTHING
    if per_row:
        return _ROWS
    if leaf.dtype.is_integer:
        return _SUM
    if leaf.dtype.is_floating or leaf.dtype.is_complex:
        return _MEAN
    raise TypeError(
        "A leaf of aux must have one entry per row, or be a number to sum or average. "
        f"Got dtype {leaf.dtype.name} and shape {leaf.shape}. Cast it to an integer or a float."
    )
