"""Nested structures of leaves: taken apart once, and built again of other leaves."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
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
