"""Finds the leaves of a batch that are padded on their second axis, and the padded length."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from virtualbatch.window.gather import is_known, kind
from virtualbatch.window.tree import builder, rank

_PASS_PADDED = (
    "Pass padded=, the structure of the batch with True for leaves that are padded there."
)


def length_by_shape(
    arrays: Sequence[tuple[str, Any]], longest: int, fix: str = _PASS_PADDED
) -> int:
    """The padded length, found from shapes and dtypes.

    Args:
        arrays: (path, array) of a batch.
        longest: the longest row.
        fix: the end of an error's text.

    Raises:
        ValueError: several lengths are possible, or none.
    """
    wide = [(path, leaf) for path, leaf in arrays if (rank(leaf) or 0) > 1]
    integers = [(path, leaf) for path, leaf in wide if kind(leaf) == "integer"]
    candidates = integers or [(path, leaf) for path, leaf in wide if _is_flat_float(leaf)]
    lengths = {leaf.shape[1] for _, leaf in candidates}
    # If a second axis is shorter than the longest row, it is not the padded one.
    fitting = {length for length in lengths if length >= longest} or lengths
    if len(fitting) != 1:
        got = "none" if not fitting else _shapes(candidates)
        raise ValueError(
            "It must be clear which leaves are padded on their second axis: of integer and "
            f"boolean leaves, or float leaves of two axes. Got {got}. {fix}"
        )
    return int(fitting.pop())


def trimmed_by_shape(
    arrays: Sequence[tuple[str, Any]], length: int, fix: str = _PASS_PADDED
) -> set[str]:
    """Paths of the leaves that are padded to a length, from shapes and dtypes.

    Args:
        arrays: (path, array) of a batch.
        length: the padded length.
        fix: the end of an error's text.

    Raises:
        ValueError: it is unclear whether a second axis of that length is padded.
    """
    with_it = [
        (path, leaf) for path, leaf in arrays if (rank(leaf) or 0) > 1 and leaf.shape[1] == length
    ]
    unclear = [
        (path, leaf)
        for path, leaf in with_it
        if length in leaf.shape[2:] or not (kind(leaf) == "integer" or _is_flat_float(leaf))
    ]
    if unclear:
        raise ValueError(
            "A second axis of the padded length is trimmed in integer and boolean leaves, and in "
            f"float leaves of two axes. Got {_shapes(unclear)} and a padded length of {length}. "
            f"{fix}"
        )
    return {path for path, _ in with_it}


def trimmed_as_told(found: Sequence[tuple[str, Any]], padded: Any) -> set[str]:
    """Paths of the padded leaves, as the caller marks them.

    Args:
        found: (path, leaf) of a batch.
        padded: the structure of the batch with booleans.

    Raises:
        ValueError: `padded` has another structure, holds anything but booleans, or marks a leaf
            without a second axis.
    """
    told: list[tuple[str, Any]] = []
    builder(padded, "batch", told, lists=False)
    places, given = [path for path, _ in found], [path for path, _ in told]
    if sorted(given) != sorted(places):
        raise ValueError(
            "padded must have the structure of the batch. "
            f"Got {', '.join(given)} for {', '.join(places)}. Pass one boolean for each leaf."
        )
    leaves = dict(found)
    for path, value in told:
        name = f"padded{path.removeprefix('batch')}"
        if is_known(leaves[path]) and not isinstance(value, bool | np.bool_):
            raise ValueError(
                f"padded must hold booleans. Got {name}={value!r}. "
                "Pass True for leaves that are padded on their second axis."
            )
        if value and (not is_known(leaves[path]) or (rank(leaves[path]) or 0) < 2):
            raise ValueError(
                "A padded leaf must be an array with a second axis. "
                f"Got {name}=True for {path}. Pass False for it."
            )
    return {path for path, value in told if value}


def padded_length(arrays: Sequence[tuple[str, Any]], trimmed: set[str], longest: int) -> int:
    """The length that all padded leaves share.

    Args:
        arrays: (path, array) of a batch.
        trimmed: paths of the padded arrays.
        longest: the length of the longest row.

    Raises:
        ValueError: padded leaves differ in length, there are none, or a row is longer than them.
    """
    leaves = [(path, leaf) for path, leaf in arrays if path in trimmed]
    lengths = {leaf.shape[1] for _, leaf in leaves}
    if len(lengths) != 1:
        raise ValueError(
            "Padded leaves must share one padded length, their second axis. "
            f"Got {_shapes(leaves) if leaves else 'no padded leaf'}. "
            "Pass padded= with True for the leaves that have it."
        )
    length = int(lengths.pop())
    check_longest(longest, length, leaves[0][0])
    return length


def check_longest(longest: int, length: int, path: str) -> None:
    """Raises an error if the longest row is longer than the padded length.

    Raises:
        ValueError: the row is longer.
    """
    if longest > length:
        raise ValueError(
            f"No length may exceed the padded axis. Got a length of {longest} and {path} padded "
            f"to {length}. Pass the lengths after truncation."
        )


def _is_flat_float(leaf: Any) -> bool:
    return kind(leaf) == "float" and rank(leaf) == 2


def _shapes(leaves: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(
        f"{path} of shape {tuple(leaf.shape)} and dtype {leaf.dtype}" for path, leaf in leaves
    )
