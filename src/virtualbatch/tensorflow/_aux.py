"""The aux of a window's micro-batches, merged for the whole batch."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._loop import Traced
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.window.aux import (
    MEAN,
    ROWS,
    SUM,
    AuxLeaf,
    AuxShapes,
    kinds,
    kinds_without_rows,
    summed_dtype,
)
from virtualbatch.window.shares import Shares, accumulator_dtype

_shapes = AuxShapes()


class WindowAux:
    """Collects the aux of a window's micro-batches.

    Args:
        loss_fn: returns (loss, aux).
        segments: the window's segments.
        traced: the segments with their steps, whose results have a field `aux`.
        shares: the shares of the window.
        is_one: whether this is the only replica. Otherwise the caller sums the window's sums over
            all replicas before `result`, and their shapes must be known.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Any],
        segments: Sequence[Segment],
        traced: Sequence[Traced],
        shares: Shares,
        is_one: bool,
    ):
        self._loss_fn = loss_fn
        self._segments = segments
        known = segments[0].rows(0) is not None
        self._shares = shares.rows if known else shares.of_rows_or_term()
        self._kept: list[Any] = []
        only = segments[0].count
        self._alone = is_one and len(segments) == 1 and isinstance(only, int) and only == 1
        self._in_graph = not tf.executing_eagerly() and not self._alone
        if self._in_graph:
            self._structure = traced[0].outputs.aux
            found = [entry.outputs.aux for entry in traced]
            self._kinds = self._kinds_of(found, tf.constant(0))
            if not is_one:
                _refuse_open_shapes(self._kinds, self._structure)

    def route(self, index: Any, aux: Any) -> tuple[list[Any], list[Any]]:
        """Splits one micro-batch's aux into leaves to sum and leaves to concatenate.

        Eagerly, and for a window of one micro-batch, the aux is kept instead and two empty lists
        are returned. The kinds are then derived from the aux of all micro-batches.
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
            self._kinds = self._kinds_of(self._kept, 0)
            routed = [
                _routed(self._kinds, share, aux)
                for share, aux in zip(self._shares, self._kept, strict=True)
            ]
            sums = [_total(column) for column in zip(*(s for s, _ in routed), strict=True)]
            rows = [_joined(column) for column in zip(*(r for _, r in routed), strict=True)]
        leaves = [
            row if total is None else _cast_like(total, leaf, kind)
            for total, row, leaf, kind in zip(
                sums, rows, tf.nest.flatten(self._structure), self._kinds, strict=True
            )
        ]
        return tf.nest.pack_sequence_as(self._structure, leaves)

    def _kinds_of(self, auxes: Sequence[Any], index: Any) -> list[str]:
        """How each leaf is merged.

        Args:
            auxes: one aux for each segment.
            index: the number of the first micro-batch in its segment.
        """
        structures, leaves = list(map(_structure, auxes)), [_leaves(aux) for aux in auxes]
        if self._segments[0].rows(index) is None:
            return kinds_without_rows(structures, leaves)
        rows = [_static_rows(segment.rows(index)) for segment in self._segments]
        # With unknown rows, a trace cannot tell one entry per row from any other unknown size.
        other = 2 if rows[0] is None else rows[0] + 1

        def at_other() -> Sequence[AuxLeaf]:
            spec = self._segments[0].with_rows(index, other)
            given = [x if isinstance(x, tf.TypeSpec) else type(x) for x in tf.nest.flatten(spec)]
            key = (_structure(spec), tuple(given), tuple(leaves[0]))
            return _shapes.of(self._loss_fn, key, lambda: self._traced_leaves(spec, other))

        return kinds(structures, leaves, rows, other, at_other)

    def _traced_leaves(self, spec: Any, rows: int) -> list[AuxLeaf]:
        traced = tf.function(lambda microbatch: self._loss_fn(microbatch)[1])
        try:
            outputs = traced.get_concrete_function(spec).structured_outputs
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise TypeError(
                "With has_aux=True a loss function must be traceable with any number of rows: "
                "this shows which leaves of aux have one entry per row. Got "
                f"{type(error).__name__} with {rows} rows: {error}. Use TensorFlow operations "
                "instead of .numpy() and of a fixed number of rows."
            ) from error
        return _leaves(outputs)


def _routed(kinds: Sequence[str], share: Any, aux: Any) -> tuple[list[Any], list[Any]]:
    sums: list[Any] = []
    rows: list[Any] = []
    for kind, value in zip(kinds, _tensors(aux), strict=True):
        if kind == MEAN:
            wide = tf.cast(value, accumulator_dtype(value.dtype.name))
            sums.append(wide * tf.cast(share, wide.dtype))
        else:
            is_sum = kind == SUM
            sums.append(tf.cast(value, summed_dtype(value.dtype.name)) if is_sum else None)
        rows.append(value if kind == ROWS else None)
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
    return [None if leaf is None else _tensor(leaf) for leaf in leaves]


def check_traceable(aux: Any) -> None:
    """Refuses leaves of aux that a traced function cannot return.

    Raises:
        TypeError: a leaf is no tensor, and cannot be converted to one.
    """
    for leaf in tf.nest.flatten(aux):
        if leaf is not None and not tf.is_tensor(leaf):
            _tensor(leaf)


def _tensor(leaf: Any) -> Any:
    try:
        return tf.convert_to_tensor(leaf)
    except (ValueError, TypeError) as error:
        raise TypeError(
            "A leaf of aux must be a dense tensor, a number or None. "
            f"Got {type(leaf).__name__}. Return it from a function of its own, or leave it out."
        ) from error


def _leaves(aux: Any) -> list[AuxLeaf]:
    return [
        AuxLeaf((), "NoneType")
        if leaf is None
        else AuxLeaf(_axes(leaf)[:1], leaf.dtype.name, _axes(leaf)[1:])
        for leaf in _tensors(aux)
    ]


def _static_rows(rows: Any) -> int | None:
    """The rows if a trace knows them, else None."""
    return rows if isinstance(rows, int) else None


def _refuse_open_shapes(kinds: Sequence[str], aux: Any) -> None:
    """Refuses summed leaves whose shape is unknown: replicas with different shapes would hang."""
    for kind, leaf in zip(kinds, _tensors(aux), strict=True):
        if kind in (MEAN, SUM) and not leaf.shape.is_fully_defined():
            raise ValueError(
                "A leaf of aux that replicas sum must have a static shape. Got shape "
                f"{leaf.shape} and dtype {leaf.dtype.name}. Return it by tf.ensure_shape(leaf, "
                "shape), or with one entry per row."
            )


def _structure(nested: Any) -> str:
    return repr(tf.nest.map_structure(lambda _: 0, nested))


def _total(column: Sequence[Any]) -> Any:
    return None if column[0] is None else tf.add_n(list(column))


def _joined(column: Sequence[Any]) -> Any:
    return None if column[0] is None else tf.concat(list(column), 0)


def _cast_like(total: Any, leaf: Any, kind: str) -> Any:
    return tf.cast(total, leaf.dtype) if kind == MEAN and hasattr(leaf, "dtype") else total


def _axes(leaf: Any) -> tuple[int | None, ...]:
    return tuple(leaf.shape) if leaf.shape.rank else ()
