"""Tensors that take a gradient and are no variables: arrays of the batch, and shared tensors."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._arrays import is_array
from virtualbatch.tensorflow._rowwise.outputs import takes_gradient
from virtualbatch.tensorflow._rowwise.recording import is_recorded, is_recording
from virtualbatch.window.window import Window


class Inputs:
    """Tensors that enter a node of differentiation.

    A graph may be differentiated from outside, and the trace cannot see that. So in a graph every
    tensor enters. A tape inside the graph gets only the gradients of tensors that it records: the
    gradients of all rows would be as large as the batch.

    Args:
        columns: for each input its tensors: one, or its pieces in the order of rows.

    Attributes:
        numbers: the numbers of the columns that enter.
        tensors: the tensors of these columns.
    """

    def __init__(self, columns: Sequence[Sequence[Any]]):
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        numbers = [k for k, column in enumerate(columns) if all(map(_may_have_gradient, column))]
        self._recorded = [k for k in numbers if any(map(is_recorded, columns[k]))]
        self._is_recording = is_recording()
        self.numbers = self._recorded if self._graph is None else numbers
        self._columns = {k: columns[k] for k in self.numbers}
        self.tensors = [x for column in self._columns.values() for x in column]

    def asked(self) -> list[int]:
        """The numbers of the columns whose gradient is needed. Call it in the gradient function."""
        inside = self._is_recording and self._graph is tf.compat.v1.get_default_graph()
        return self._recorded if inside else self.numbers

    def gradients(self, asked: Sequence[int], found: Sequence[Any]) -> list[Any]:
        """The gradient of each tensor; None for a tensor whose gradient was not asked for.

        Args:
            asked: the numbers of columns.
            found: the gradient of each of these columns, with the entries of all pieces in order.
        """
        of_columns = dict(zip(asked, found, strict=True))
        result: list[Any] = []
        for k, column in self._columns.items():
            pieces = [None] * len(column)
            if k in of_columns:
                pieces = _like(column, of_columns[k])
            result.extend(pieces)
        return result


def rows_of(batch: Any) -> list[list[Any]]:
    """The tensors of each array of a batch, or of a Window, in the order of rows."""
    pieces = [tensors_of(x) for x in (batch if isinstance(batch, Window) else [batch])]
    return [list(column) for column in zip(*pieces, strict=True)]


def tensors_of(batch: Any) -> list[Any]:
    """The tensor with the values of each array of a batch or micro-batch, in order."""
    return [_values(leaf) for leaf in tf.nest.flatten(batch) if is_array(leaf)]


def _values(leaf: Any) -> Any:
    if isinstance(leaf, tf.RaggedTensor):
        return leaf.flat_values
    return leaf.values if isinstance(leaf, tf.SparseTensor) else leaf


def read_variables(batch: Any) -> Any:
    """The batch with its variables replaced by tensors, which get gradients as rows."""

    def read(leaf: Any) -> Any:
        # Variables of Keras have `__tf_tensor__`. A tensor is converted to itself.
        is_read = isinstance(leaf, tf.Variable) or hasattr(leaf, "__tf_tensor__")
        return tf.convert_to_tensor(leaf) if is_read else leaf

    return tf.nest.map_structure(read, batch)


def _may_have_gradient(x: Any) -> bool:
    return isinstance(x, tf.Tensor) and takes_gradient(x.dtype)


def _like(pieces: Sequence[Any], flat: Any) -> list[Any]:
    """Splits flat entries into tensors with the shapes of some pieces."""
    parts = [flat] if len(pieces) == 1 else tf.split(flat, [tf.size(x) for x in pieces])
    return [tf.reshape(part, tf.shape(x)) for part, x in zip(parts, pieces, strict=True)]
