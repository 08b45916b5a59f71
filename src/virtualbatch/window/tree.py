"""Takes nested structures apart into leaves, and builds them again from other leaves."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from virtualbatch.window.rebuilt import is_made_by_constructor, rebuilder
from virtualbatch.window.row_list import RowList, is_list, is_sequence, shown

# Leaves, in the order of the structure -> the structure.
Builder = Callable[[Sequence[Any]], Any]


def builder(
    structure: Any,
    path: str,
    leaves: list[tuple[str, Any]],
    one_leaf: tuple[type, ...] = (),
    lists: bool = True,
) -> Builder:
    """Finds the leaves of a structure, and returns a function that builds it from other leaves.

    Args:
        structure: nested mappings, lists, tuples and dataclasses, or a part of these.
        path: the expression for the structure.
        leaves: the expression and the leaf are appended for every leaf.
        one_leaf: classes that are leaves although they are sequences or mappings.
        lists: whether a list without an array is one leaf, see `is_list`. The new structure gets a
            copy of it, also if a `RowList` took its place.

    Raises:
        ValueError: the structure is nested too deeply, or contains itself.
    """
    try:
        return _builder(structure, path, leaves, one_leaf, lists)
    except RecursionError as error:
        raise ValueError(
            f"A nested structure must end. Got {path} of type {type(structure).__name__}, which "
            "holds itself or is nested deeper than Python can follow. Pass its arrays in a dict."
        ) from error


def _builder(
    structure: Any,
    path: str,
    leaves: list[tuple[str, Any]],
    one_leaf: tuple[type, ...],
    lists: bool,
) -> Builder:
    if lists and is_list(structure):
        leaves.append((path, structure))
        index = len(leaves) - 1
        return lambda found: shown(found[index])
    parts = None if isinstance(structure, one_leaf) else parts_of(structure)
    if parts is None:
        leaves.append((path, structure))
        return itemgetter(len(leaves) - 1)
    items, join = parts
    builds = [_builder(item, f"{path}{place}", leaves, one_leaf, lists) for place, item in items]
    return lambda found: join([build(found) for build in builds])


def array_leaves(structure: Any, path: str = "batch") -> list[tuple[str, Any]]:
    """Every array in a nested structure, with the expression for it.

    A leaf with a `shape` is an array; other leaves (None, numbers, text) are shared by all rows.

    Args:
        structure: as in `builder`.
        path: the expression for the structure.

    Returns:
        Pairs such as `("batch['x'][0]", array)`; mappings in the order of their keys.
    """
    leaves: list[tuple[str, Any]] = []
    builder(structure, path, leaves)
    return [(place, leaf) for place, leaf in leaves if hasattr(leaf, "shape")]


def mapped(fn: Callable[[Any], Any], structure: Any) -> Any:
    """The structure with a function applied to every leaf."""
    leaves: list[tuple[str, Any]] = []
    build = builder(structure, "", leaves)
    return build([fn(leaf) for _, leaf in leaves])


def with_row_lists(leaves: Sequence[Any], rows: int) -> list[Any]:
    """The leaves; lists as long as the batch become `RowList`s, so that they are cut.

    Args:
        leaves: as `builder` finds them.
        rows: rows of the batch.
    """
    return [RowList(leaf) if is_sequence(leaf) and len(leaf) == rows else leaf for leaf in leaves]


def parts_of(structure: Any) -> tuple[list[tuple[str, Any]], Callable[[list[Any]], Any]] | None:
    """The parts directly inside a structure, with the ends of the expressions for them.

    Returns:
        The parts, and a function that builds the structure from other parts; None for a leaf.
    """
    kind: Any = type(structure)
    if hasattr(structure, "_fields") and isinstance(structure, tuple):
        names = kind._fields
        return [(f".{n}", getattr(structure, n)) for n in names], lambda parts: kind(*parts)
    if isinstance(structure, list | tuple):
        return [(f"[{k}]", item) for k, item in enumerate(structure)], partial(_sequence, kind)
    if isinstance(structure, Mapping):
        keys = list(structure)

        def mapping(parts: list[Any]) -> Any:
            pairs = zip(keys, parts, strict=True)
            if kind is dict or not isinstance(structure, MutableMapping):
                return dict(pairs)
            # The constructor of another mapping may take any arguments.
            result = copy.copy(structure)
            for key, part in pairs:
                result[key] = part
            return result

        return [(f"[{key!r}]", structure[key]) for key in keys], mapping
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        if is_made_by_constructor(structure):
            return rebuilder(structure)
        names = [field.name for field in dataclasses.fields(structure)]

        def instance(parts: list[Any]) -> Any:
            result = copy.copy(structure)
            for name, part in zip(names, parts, strict=True):
                # A frozen dataclass does not allow plain assignment.
                object.__setattr__(result, name, part)
            return result

        return [(f".{name}", getattr(structure, name)) for name in names], instance
    return None


def _sequence(kind: Any, parts: list[Any]) -> Any:
    """A list or tuple of the given class, made from its parts."""
    try:
        return kind(parts)
    except TypeError as error:
        raise TypeError(
            "A list or tuple of a class must be made of its parts alone, as list and tuple are. "
            f"Got {kind.__name__}, which refuses them: {error}. Pass a list, a tuple or a dict."
        ) from error


def rank(array: Any) -> int | None:
    """Number of axes of an array; None if a traced shape leaves it open."""
    # TensorFlow raises an error for the length of an open shape, but its rank is None.
    open_shape = getattr(array.shape, "rank", 0) is None
    return None if open_shape else len(array.shape)


def rows_if_shared(leaves: Iterable[tuple[str, Any]]) -> int | None:
    """Rows that all arrays share; None if they differ or a trace leaves them open.

    Args:
        leaves: as in `common_rows`.
    """
    sizes = {leaf.shape[0] if rank(leaf) else None for _, leaf in leaves}
    only = sizes.pop() if len(sizes) == 1 else None
    return int(only) if only else None


def common_rows(leaves: Iterable[tuple[str, Any]], or_else: str = "") -> int | None:
    """Rows that all arrays of a batch share, as far as their shapes are known.

    Args:
        leaves: (path, array) pairs, from `array_leaves`.
        or_else: the end of an error's text.

    Returns:
        The number of rows; None if every array leaves it open (a traced shape).

    Raises:
        ValueError: there is no array, an array is a scalar, there are no rows, or two arrays
            have different numbers of rows.
    """
    known: tuple[str, int] | None = None
    found = False
    for path, leaf in leaves:
        found = True
        axes = rank(leaf)
        if axes is None:
            continue
        if axes == 0:
            raise ValueError(
                "Every array of a batch must have rows on its first axis. "
                f"Got the scalar {path}. Give it one value per row, or pass it to the loss "
                f"function by a closure.{or_else}"
            )
        rows = leaf.shape[0]
        if rows is None:
            continue
        if rows == 0:
            raise ValueError(
                f"A batch must have at least one row. Got 0 rows in {path}. "
                f"Skip empty batches before the call.{or_else}"
            )
        if known is not None and rows != known[1]:
            raise ValueError(
                "All arrays of a batch must have the same number of rows. "
                f"Got {known[1]} rows in {known[0]} and {rows} rows in {path}. "
                f"Pass arrays that share their leading axis.{or_else}"
            )
        known = known or (path, int(rows))
    if not found:
        raise ValueError(
            "A batch must hold at least one array. Got none. "
            f"Pass arrays or tensors that share their leading axis.{or_else}"
        )
    return known[1] if known else None
