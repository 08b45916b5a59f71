"""The leaves of a batch: arrays, which hold rows, and lists with one entry per row."""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from virtualbatch.window.row_list import RowList, is_list
from virtualbatch.window.tree import array_leaves, parts_of, rank


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a batch has rows. Any other leaf belongs to all rows."""
    return hasattr(leaf, "shape")


def map_rows(fn: Callable[[Any], Any], batch: Any) -> Any:
    """Applies fn to every array of a nested structure. Other leaves stay as they are."""
    return tf.nest.map_structure(lambda leaf: fn(leaf) if is_array(leaf) else leaf, batch)


def as_tensor(leaf: Any) -> Any:
    """An array as a tensor. Ragged and sparse tensors and leaves without rows stay as they are.

    Raises:
        TypeError: the leaf has a shape, but TensorFlow cannot make a tensor of it.
    """
    if not is_array(leaf) or isinstance(leaf, tf.RaggedTensor | tf.SparseTensor):
        return leaf
    try:
        return tf.convert_to_tensor(leaf)
    except (ValueError, TypeError) as error:
        raise TypeError(
            f"Arrays of a batch must be convertible to tensors. Got {type(leaf).__name__}: "
            f"{error} Pass a tensor, or leave it out."
        ) from error


def as_tensors(batch: Any) -> Any:
    """The batch with its arrays as tensors. Lists stay lists."""
    found = tf.nest.map_structure(as_tensor, marking(batch))
    return map_lists(lambda x: x.items, found)


def after(operations: list[Any], structure: Any) -> Any:
    """The same arrays, which cannot be read before the operations have run."""
    with tf.control_dependencies([found for found in operations if found is not None]):
        return map_rows(tf.identity, structure)


def specs(microbatch: Any, rows: int | None = None) -> Any:
    """Specs of the arrays of a micro-batch, with another number of rows if one is given."""

    def spec(leaf: Any) -> Any:
        found = tf.type_spec_from_value(leaf)
        if rows is None:
            return found
        shape = tf.TensorShape([rows]).concatenate(found.shape[1:])
        if isinstance(found, tf.RaggedTensorSpec):
            return tf.RaggedTensorSpec(
                shape, found.dtype, found.ragged_rank, found.row_splits_dtype
            )
        return type(found)(shape, found.dtype)

    return map_rows(spec, microbatch)


def named_arrays(batch: Any, path: str = "batch", or_else: str = "") -> list[tuple[str, Any]]:
    """Every array of a batch, with the expression that reaches it.

    Args:
        batch: nested structure.
        path: the name of the batch in errors.
        or_else: the end of error messages.
    """
    marked = marking(batch)
    named, seen = array_leaves(marked, path), arrays_of(marked)
    if len(named) == len(seen):
        return named
    known = set(map(id, seen))
    for place, leaf in named:
        if id(leaf) not in known:
            raise TypeError(
                "Arrays of a batch must be where tf.nest finds them. "
                f"Got {place} inside of something else. "
                "Pass a dict, or give its class TensorFlow's nest protocol (__tf_flatten__)."
                f"{or_else}"
            )
    # TensorFlow also finds arrays in attrs classes and in classes with its nest protocol.
    flat = tf.nest.flatten(marked)
    return [(f"tf.nest.flatten({path})[{i}]", x) for i, x in enumerate(flat) if is_array(x)]


def arrays_of(batch: Any) -> list[Any]:
    """The arrays of a batch, in the order of `tf.nest.flatten`."""
    return [leaf for leaf in tf.nest.flatten(batch) if is_array(leaf)]


def is_open(batch: Any) -> bool:
    """Whether a trace does not know the rows of some array."""
    return any(rank(array) is None or array.shape[0] is None for array in arrays_of(batch))


def row_counts(batch: Any) -> Any:
    """Rows of every array of a batch, as an int32 vector in a graph."""

    def count(array: Any) -> Any:
        if isinstance(array, tf.RaggedTensor):
            return array.nrows(tf.int32)
        if isinstance(array, tf.SparseTensor):
            return tf.cast(array.dense_shape[0], tf.int32)
        return tf.shape(array)[0]

    return tf.stack([count(array) for array in arrays_of(batch)])


def most_entries(microbatch: Any) -> Any:
    """The most rows of any array at run time; None if a trace knows the rows of some array."""
    arrays = [array for array in arrays_of(microbatch) if rank(array) != 0]
    if not arrays or any(rank(array) and array.shape[0] is not None for array in arrays):
        return None
    return tf.reduce_max(row_counts(arrays))


def count_rows(microbatch: Any) -> Any:
    """The rows of a micro-batch at run time, as an int32 scalar."""
    return row_counts(microbatch)[0]


def equal_rows(counts: Any, least: int = 1) -> Any:
    """An assertion for run time: all arrays have the same number of rows, which is large enough.

    It is for rows that the trace does not know. Known rows are compared before.
    """
    return tf.debugging.Assert(
        tf.logical_and(tf.reduce_all(tf.equal(counts, counts[0])), counts[0] > least - 1),
        [
            f"All arrays of a batch must have the same number of rows{', at least one' * least}. "
            "Got rows",
            counts,
            "in the order of tf.nest.flatten(batch). Pass arrays that share their leading axis.",
        ],
    )


def open_if_empty(batch: Any) -> Any:
    """The batch, but the trace does not know the rows of arrays with 0 rows.

    So nothing is traced for 0 rows, which may not even give possible shapes.
    """

    def opened(tensor: Any) -> Any:
        return tf.compat.v1.placeholder_with_default(tensor, [None, *tensor.shape[1:]])

    def leaf_or_open(leaf: Any) -> Any:
        if rank(leaf) in (None, 0) or leaf.shape[0] != 0:
            return leaf
        if isinstance(leaf, tf.RaggedTensor):
            splits = map(opened, leaf.nested_row_splits)
            values = opened(leaf.flat_values)
            return tf.RaggedTensor.from_nested_row_splits(values, list(splits), validate=False)
        return leaf if isinstance(leaf, tf.SparseTensor) else opened(tf.convert_to_tensor(leaf))

    return map_rows(leaf_or_open, batch)


def refuse_sparse(batch: Any) -> None:
    """Refuses sparse tensors, which cannot be cut by rows.

    Raises:
        TypeError: there is a sparse tensor.
    """
    if any(isinstance(leaf, tf.SparseTensor) for leaf in arrays_of(batch)):
        raise TypeError(
            "Arrays of a batch must be dense or ragged. Got a SparseTensor. "
            "Pass tf.sparse.to_dense(...), or a Window whose micro-batches you cut yourself."
        )


def marked_if_any(batch: Any) -> Any:
    """The batch with every list without an array as one `RowList`; None if there are none."""
    found = marking(batch)
    return None if found is batch else found


def marking(part: Any) -> Any:
    """The batch with every list without an array as one `RowList`; unchanged if there are none."""
    if is_list(part):
        return RowList(part)
    # tf.nest does not look into every object that has parts.
    parts = parts_of(part) if isinstance(part, list | tuple | Mapping) else None
    if parts is None:
        return part
    items, join = parts
    found = [marking(item) for _, item in items]
    alike = all(new is item for new, (_, item) in zip(found, items, strict=True))
    return part if alike else join(found)


def row_lists(marked: Any) -> list[Any]:
    """The items of every marked list."""
    return [leaf.items for leaf in tf.nest.flatten(marked) if isinstance(leaf, RowList)]


def with_row_lists(marked: Any, rows: int) -> Any:
    """The batch, with only those lists marked that have one entry per row."""
    return map_lists(lambda x: x if len(x.items) == rows else x.items, marked)


def map_lists(fn: Callable[[RowList], Any], batch: Any) -> Any:
    """Applies fn to every marked list. Other leaves stay as they are."""
    return tf.nest.map_structure(lambda x: fn(x) if isinstance(x, RowList) else x, batch)


def eager_rows(rows: int | None) -> int:
    """The rows of an eager batch, which are always known."""
    if rows is None:
        raise ValueError("internal: an eager batch has no number of rows.")
    return rows
