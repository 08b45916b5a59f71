"""Lists with one entry per row: numbers, texts, or anything else that is not an array."""

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

_PLAIN = (numbers.Number, str, bytes, type(None), np.generic)


class RowList:
    """A list that is cut with the rows; engines keep it among the leaves of a batch.

    Loss functions get `items`. It is a class, so that no framework looks for leaves inside.

    Args:
        items: one entry per row, a list or a tuple.
    """

    __slots__ = ("items",)

    def __init__(self, items: Any):
        self.items = items

    def __repr__(self) -> str:
        return repr(self.items)

    def cut(self, start: int, stop: int) -> "RowList":
        """The entries of a range of rows."""
        return RowList(self.items[start:stop])

    def chosen(self, rows: Iterable[int]) -> "RowList":
        """The entries of some rows."""
        return RowList(type(self.items)(self.items[row] for row in rows))

    def stretched(self, rows: int) -> "RowList":
        """A list for another number of rows, with the entries repeated."""
        return self.chosen(row % len(self.items) for row in range(rows))


def shown(leaf: Any) -> Any:
    """What a loss function gets for a leaf: lists are copied, because it may change them."""
    if isinstance(leaf, RowList):
        return leaf.items[:]
    return leaf[:] if isinstance(leaf, list) else leaf


def is_list(structure: Any) -> bool:
    """Whether this is one leaf, a list without an array inside, and not a structure.

    Named tuples and other subclasses of tuple, such as the shapes of frameworks, are structures. An
    empty list is a structure, too.
    """
    return is_sequence(structure) and bool(structure) and not any(map(_holds_array, structure))


def is_sequence(leaf: Any) -> bool:
    """Whether this is a list or a plain tuple."""
    return isinstance(leaf, list) or type(leaf) is tuple


def stranger(leaf: Any, shared: tuple[type, ...]) -> Any:
    """The first entry of a leaf, at any depth, that is of none of the classes; None if all are."""
    if not is_sequence(leaf):
        return None if isinstance(leaf, shared) else leaf
    return next((item for item in _entries(leaf) if not isinstance(item, shared)), None)


def _entries(items: Any) -> Iterable[Any]:
    for item in items.values() if isinstance(items, Mapping) else items:
        if isinstance(item, list | tuple | Mapping):
            yield from _entries(item)
        else:
            yield item


def _holds_array(item: Any) -> bool:
    if isinstance(item, _PLAIN):
        return False
    if hasattr(item, "shape"):
        return True
    if isinstance(item, list | tuple):
        return any(map(_holds_array, item))
    if isinstance(item, Mapping):
        return any(map(_holds_array, item.values()))
    if is_dataclass(item) and not isinstance(item, type):
        return any(_holds_array(getattr(item, field.name)) for field in fields(item))
    return False
