"""Cuts batches so that rows that belong together stay in one micro-batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from virtualbatch.window.cut import check_sizes
from virtualbatch.window.gather import gathered, is_known, on_host
from virtualbatch.window.row_list import RowList
from virtualbatch.window.tree import builder, common_rows, with_row_lists
from virtualbatch.window.window import Window


def whole_groups(batch: Any, groups: Any, *, microbatch_size: int) -> Window:
    """Cuts a batch into micro-batches and never splits a group of rows.

    Use it for losses that compare the rows of a group, such as a ranked list, the answers to one
    prompt or the crops of one image. Groups are taken in the order of their first rows; each goes
    into the current micro-batch if it fits, otherwise into the next. Rows of a group need not be
    neighbours.
    A loss that is a mean over groups needs `weight`, the number of groups in a micro-batch.

    Args:
        batch: nested dicts, lists, tuples and dataclasses of arrays (NumPy, PyTorch, TensorFlow or
            JAX) that share their leading axis, the rows. Lists as long as the batch follow them.
        groups: the group of each row, (rows,): integers or text, in an array or a list.
        microbatch_size: rows that a micro-batch may have.

    Returns:
        A `Window`, for any engine.

    Raises:
        ValueError: there is not one group per row, a group has more rows than a micro-batch, the
            size is not a positive integer, or arrays differ in rows or have none.
        TypeError: an array is of an unknown framework.

    Example:
        >>> scores = np.array([0.5, 0.1, 0.9, 0.3, 0.7])
        >>> window = whole_groups({"score": scores}, [7, 7, 4, 7, 4], microbatch_size=3)
        >>> [microbatch["score"].tolist() for microbatch in window]
        [[0.5, 0.1, 0.3], [0.9, 0.7]]
    """
    check_sizes(microbatch_size, None)
    found: list[tuple[str, Any]] = []
    build = builder(batch, "batch", found)
    arrays = [(path, leaf) for path, leaf in found if hasattr(leaf, "shape")]
    for path, leaf in arrays:
        _check_known(path, leaf)
    rows = common_rows(arrays)
    if rows is None:
        raise ValueError(
            "The number of rows must be known. Got a batch whose rows a trace leaves open. "
            "Call whole_groups outside of tf.function."
        )
    leaves = with_row_lists([leaf for _, leaf in found], rows)
    cut = _cut(_numbers(groups, rows), int(microbatch_size))
    return Window(build([_rows_of(leaf, piece) for leaf in leaves]) for piece in cut)


def _numbers(groups: Any, rows: int) -> np.ndarray:
    """The group of each row, in NumPy."""
    found = on_host(groups)
    if found.shape != (rows,):
        raise ValueError(
            "Every row belongs to one group. "
            f"Got groups of shape {found.shape} for {rows} rows. Pass one entry per row."
        )
    if found.dtype.kind == "O" and all(isinstance(name, str) for name in found):
        # Tables such as pandas keep text as objects.
        return found.astype(str)
    if found.dtype.kind not in "iubUS":
        raise ValueError(
            "Groups must be integers or text, because equal values form a group. "
            f"Got groups of {'floating numbers' if found.dtype.kind == 'f' else found.dtype}. "
            "Pass integers or text."
        )
    return found


def _cut(groups: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Row numbers of each micro-batch, whole groups in the order of their first rows."""
    names, first, number, counts = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    largest = int(counts.argmax())
    if counts[largest] > size:
        raise ValueError(
            "A group must fit into one micro-batch. "
            f"Got a group of {counts[largest]} rows ({names[largest].item()!r}) and "
            f"microbatch_size={size}. Pass a larger size, or wrap the model in rowwise and let "
            "the loss see all rows: see docs/guides/rowwise.md."
        )
    # Sorting is stable, so that rows of a group stay in their order.
    members = np.split(np.argsort(number, kind="stable"), np.cumsum(counts)[:-1])
    piece: list[np.ndarray] = []
    held = 0
    for group in np.argsort(first):
        if held + counts[group] > size:
            yield np.concatenate(piece)
            piece, held = [], 0
        piece.append(members[group])
        held += counts[group]
    yield np.concatenate(piece)


def _rows_of(leaf: Any, rows: Sequence[int] | np.ndarray) -> Any:
    if isinstance(leaf, RowList):
        return leaf.chosen(rows)
    return gathered(leaf, np.asarray(rows), None) if hasattr(leaf, "shape") else leaf


def _check_known(path: str, leaf: Any) -> None:
    if not is_known(leaf):
        raise TypeError(
            "Arrays of a batch must be dense arrays of NumPy, PyTorch, TensorFlow or JAX. "
            f"Got {path} of type {type(leaf).__name__}. Convert it."
        )
