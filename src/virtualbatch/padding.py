"""Which leaves of a batch are padded on their second axis, and to what length."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from virtualbatch.gathering import is_known, kind
from virtualbatch.nesting import builder
from virtualbatch.split import rank


def trimmed_by_shape(arrays: Sequence[tuple[str, Any]], longest: int) -> set[str]:
    """Paths of the padded leaves, where their shapes and dtypes tell.

    Args:
        arrays: (path, array) of a batch.
        longest: the longest row.

    Raises:
        ValueError: several lengths could be the padded one, or none, or a leaf with the padded
            length on its second axis may have something else there.
    """
    wide = [(path, leaf) for path, leaf in arrays if (rank(leaf) or 0) > 1]
    integers = [(path, leaf) for path, leaf in wide if kind(leaf) == "integer"]
    flat_floats = [(p, leaf) for p, leaf in wide if kind(leaf) == "float" and rank(leaf) == 2]
    candidates = integers or flat_floats
    lengths = {leaf.shape[1] for _, leaf in candidates}
    # Leaves that are too short for the longest row have something else on that axis.
    fitting = {length for length in lengths if length >= longest} or lengths
    if len(fitting) != 1:
        got = "none" if not fitting else _shapes(candidates)
        raise ValueError(
            "pack must know which leaves are padded on their second axis: of integer and boolean "
            f"leaves, or float leaves of two axes. Got {got}. "
            "Pass padded=, the structure of the batch with True for those that are."
        )
    length = fitting.pop()
    with_it = [(path, leaf) for path, leaf in wide if leaf.shape[1] == length]
    known = {path for path, leaf in [*integers, *flat_floats] if length not in leaf.shape[2:]}
    unclear = [(path, leaf) for path, leaf in with_it if path not in known]
    if unclear:
        raise ValueError(
            "A second axis of the padded length is trimmed in integer and boolean leaves, and in "
            f"float leaves of two axes. Got {_shapes(unclear)} and a padded length of {length}. "
            "Pass padded=, the structure of the batch with True for leaves that are padded there."
        )
    return {path for path, _ in with_it}


def trimmed_as_told(found: Sequence[tuple[str, Any]], padded: Any) -> set[str]:
    """Paths of the padded leaves, as the caller says.

    Args:
        found: (path, leaf) of a batch.
        padded: the structure of the batch with booleans.

    Raises:
        ValueError: it is another structure, holds something else, or names a leaf without a
            second axis.
    """
    told: list[tuple[str, Any]] = []
    builder(padded, "batch", told)
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
        trimmed: paths of the padded ones.
        longest: the longest row.

    Raises:
        ValueError: they share none, there are none, or a row is longer.
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
    if longest > length:
        raise ValueError(
            f"No length may exceed the padded axis. Got a length of {longest} and {leaves[0][0]} "
            f"padded to {length}. Pass the lengths after truncation."
        )
    return length


def _shapes(leaves: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(
        f"{path} of shape {tuple(leaf.shape)} and dtype {leaf.dtype}" for path, leaf in leaves
    )
