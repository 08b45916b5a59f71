"""Nested structures of leaves: taken apart once, and built again of other leaves."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from operator import itemgetter
from typing import Any

# Leaves, in the order of the structure -> the structure.
Builder = Callable[[Sequence[Any]], Any]


def builder(
    structure: Any,
    path: str,
    leaves: list[tuple[str, Any]],
    one_leaf: tuple[type, ...] = (),
) -> Builder:
    """Finds the leaves of a structure, and what makes the same structure of others.

    Args:
        structure: nested mappings, lists, tuples and dataclasses, or a part of such.
        path: the expression that reaches it.
        leaves: takes the expression and the leaf of every leaf found.
        one_leaf: classes that are leaves although they are sequences or mappings.
    """
    if isinstance(structure, one_leaf):
        pass
    elif isinstance(structure, list | tuple):
        if not is_text(structure):
            return _sequence_builder(structure, path, leaves, one_leaf)
    elif isinstance(structure, Mapping):
        return _mapping_builder(structure, path, leaves, one_leaf)
    elif dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        return _dataclass_builder(structure, path, leaves, one_leaf)
    leaves.append((path, structure))
    return itemgetter(len(leaves) - 1)


def is_text(leaf: Any) -> bool:
    """Whether this is what loaders make of one text per row."""
    return (
        isinstance(leaf, list | tuple)
        and bool(leaf)
        and all(isinstance(item, str | bytes) for item in leaf)
    )


def _sequence_builder(
    structure: Sequence[Any],
    path: str,
    leaves: list[tuple[str, Any]],
    one_leaf: tuple[type, ...],
) -> Builder:
    kind: Any = type(structure)
    if hasattr(structure, "_fields"):
        fields = [
            builder(getattr(structure, n), f"{path}.{n}", leaves, one_leaf)
            for n in structure._fields
        ]
        return lambda found: kind(*[build(found) for build in fields])
    items = [builder(item, f"{path}[{i}]", leaves, one_leaf) for i, item in enumerate(structure)]
    return lambda found: kind([build(found) for build in items])


def _mapping_builder(
    structure: Mapping[Any, Any],
    path: str,
    leaves: list[tuple[str, Any]],
    one_leaf: tuple[type, ...],
) -> Builder:
    items = {
        key: builder(structure[key], f"{path}[{key!r}]", leaves, one_leaf) for key in structure
    }
    if type(structure) is dict or not isinstance(structure, MutableMapping):
        return lambda found: {key: build(found) for key, build in items.items()}

    def mapping(found: Sequence[Any]) -> Any:
        # Constructors of other mappings take who knows what.
        result = copy.copy(structure)
        for key, build in items.items():
            result[key] = build(found)
        return result

    return mapping


def _dataclass_builder(
    structure: Any, path: str, leaves: list[tuple[str, Any]], one_leaf: tuple[type, ...]
) -> Builder:
    fields = {
        field.name: builder(
            getattr(structure, field.name), f"{path}.{field.name}", leaves, one_leaf
        )
        for field in dataclasses.fields(structure)
    }

    def instance(found: Sequence[Any]) -> Any:
        result = copy.copy(structure)
        for name, build in fields.items():
            # A frozen dataclass refuses plain assignment.
            object.__setattr__(result, name, build(found))
        return result

    return instance


def array_leaves(structure: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Every array in a nested structure with the expression that reaches it.

    Arrays are what has a `shape`; other leaves (None, numbers, text) belong to every row.

    Args:
        structure: nested mappings, sequences and arrays.
        path: name of the structure itself.

    Yields:
        Pairs such as `("batch['x'][0]", array)`; mappings in the order of their keys.
    """
    if hasattr(structure, "shape"):
        yield path, structure
    elif isinstance(structure, Mapping):
        for key in structure:
            yield from array_leaves(structure[key], f"{path}[{key!r}]")
    elif hasattr(structure, "_fields"):
        for field in structure._fields:
            yield from array_leaves(getattr(structure, field), f"{path}.{field}")
    elif isinstance(structure, Sequence) and not isinstance(structure, str | bytes):
        for index, item in enumerate(structure):
            yield from array_leaves(item, f"{path}[{index}]")


def rank(array: Any) -> int | None:
    """Number of axes of an array, or None where a traced shape leaves it open."""
    # TensorFlow refuses the length of an open shape, but tells its rank.
    open_shape = getattr(array.shape, "rank", 0) is None
    return None if open_shape else len(array.shape)


def common_rows(leaves: Iterable[tuple[str, Any]]) -> int | None:
    """Rows that all arrays of a batch share, as far as their shapes are known.

    Args:
        leaves: (path, array) pairs, as `array_leaves` gives them.

    Returns:
        The number of rows, or None where every array leaves it open (a traced shape).

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
                "function by a closure."
            )
        rows = leaf.shape[0]
        if rows is None:
            continue
        if rows == 0:
            raise ValueError(
                f"A batch must have at least one row. Got 0 rows in {path}. "
                "Skip empty batches before the call."
            )
        if known is not None and rows != known[1]:
            raise ValueError(
                "All arrays of a batch must have the same number of rows. "
                f"Got {known[1]} rows in {known[0]} and {rows} rows in {path}. "
                "Pass arrays that share their leading axis."
            )
        known = known or (path, int(rows))
    if not found:
        raise ValueError(
            "A batch must hold at least one array. Got none. "
            "Pass arrays or tensors that share their leading axis."
        )
    return known[1] if known else None
