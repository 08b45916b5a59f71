"""Combines aux, what a loss function returns beside its loss, over the micro-batches of a window.

A leaf with one entry per row is concatenated, an integer leaf is summed, and any other leaf is
averaged by rows, unless the engine or the user knows better. Two numbers of rows are needed to see
whether a leaf has one entry per row, because a shape of 10 may mean ten rows or ten classes.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

ROWS, SUM, MEAN, NOTHING = "rows", "sum", "mean", "nothing"
# KEEP takes the value of one micro-batch, because all are equal; MAX takes the largest entries.
KEEP, MAX = "keep", "max"


class AuxLeaf(NamedTuple):
    """Shape and type of a leaf of aux, which decide how it is combined.

    Fields:
        length: a tuple with the first entry of its shape (None if a trace leaves it open); () if
            the leaf has no axes.
        dtype: the name of its dtype, or of its type if it is not an array.
        inner: the further entries of its shape.
    """

    length: tuple[int | None, ...]
    dtype: str
    inner: tuple[int | None, ...] = ()


def kinds(
    structures: Sequence[Any],
    auxes: Sequence[Sequence[AuxLeaf]],
    rows: Sequence[int | None],
    other: int,
    at_other: Callable[[], Sequence[AuxLeaf]],
    asked: Sequence[str | None] | None = None,
    kind_of: Callable[[int, str], str] = lambda _, dtype: kind_of_dtype(dtype),
) -> list[str]:
    """How each leaf of aux is combined.

    Args:
        structures: the structure of aux for each micro-batch, or for one micro-batch of each shape.
            Equal structures compare equal.
        auxes: leaves of these micro-batches, in order.
        rows: rows of these micro-batches; None if a trace leaves them open.
        other: another number of rows.
        at_other: () -> the leaves of aux for `other` rows. It is called only if `rows` do not
            decide.
        asked: for each leaf, the kind that the user asked for, or None.
        kind_of: (number, dtype) of a leaf without one entry per row -> its kind.

    Returns:
        One kind for each leaf.

    Raises:
        TypeError: a leaf can be neither concatenated, summed nor averaged.
        ValueError: the structure differs between micro-batches, or a leaf has its rows on an axis
            after the first.
    """
    if any(structure != structures[0] for structure in structures):
        raise _changed()
    columns = list(zip(*auxes, strict=True))
    asked = asked or [None] * len(columns)
    follows = [
        kind is None and all(leaf.length == (n,) for leaf, n in zip(column, rows, strict=True))
        for column, kind in zip(columns, asked, strict=True)
    ]
    per_row = follows
    inner = [
        set() if kind or here else _inner_axes_of_rows(column, rows)
        for column, kind, here in zip(columns, asked, follows, strict=True)
    ]
    if (any(follows) or any(inner)) and len({n for n in rows if n is not None}) < 2:
        leaves = at_other()
        if len(leaves) != len(columns):
            raise _changed()
        per_row = [
            here and leaf.length == (other,) for here, leaf in zip(follows, leaves, strict=True)
        ]
        inner = [
            axes & _inner_axes_of_rows([leaf], [other])
            for axes, leaf in zip(inner, leaves, strict=True)
        ]
    for axes, column in zip(inner, columns, strict=True):
        if axes:
            shape = (*column[0].length, *column[0].inner)
            raise ValueError(
                "A leaf of aux must have its rows on the first axis. "
                f"Got shape {shape} with the rows on axis {min(axes)}. "
                "Return it with that axis first. See docs/guides/rows.md."
            )
    _check_shapes(columns, per_row, asked)
    return [
        kind or (ROWS if one_per_row else _kind(number, column, kind_of))
        for number, (kind, one_per_row, column) in enumerate(
            zip(asked, per_row, columns, strict=True)
        )
    ]


def _check_shapes(
    columns: Sequence[Sequence[AuxLeaf]], per_row: Sequence[bool], asked: Sequence[str | None]
) -> None:
    """Raises an error for leaves whose shapes in the micro-batches do not fit together."""
    for column, judged, kind in zip(columns, per_row, asked, strict=True):
        one_per_row = judged or kind == ROWS
        shapes = {leaf.inner if one_per_row else (*leaf.length, *leaf.inner) for leaf in column}
        if len(shapes) > 1 and kind != KEEP:
            raise ValueError(
                "A leaf of aux must have one entry per row, or one shape in every micro-batch. "
                f"Got shapes {sorted(map(str, shapes))}. "
                "Return what can be concatenated, summed or averaged."
            )


def _inner_axes_of_rows(column: Sequence[AuxLeaf], rows: Sequence[int | None]) -> set[int]:
    """Axes after the first that are as long as the micro-batch in every micro-batch."""
    if None in rows:
        return set()
    pairs = list(zip(column, rows, strict=True))
    axes = range(min(len(leaf.inner) for leaf in column))
    return {k + 1 for k in axes if all(leaf.inner[k] == n for leaf, n in pairs)}


def kinds_without_rows(structures: Sequence[Any], auxes: Sequence[Sequence[AuxLeaf]]) -> list[str]:
    """How each leaf of aux is combined if the rows of micro-batches are unknown.

    Shapes cannot tell rows from classes then, so every leaf with an axis is concatenated.

    Args:
        structures: as in `kinds`.
        auxes: as in `kinds`.

    Raises:
        TypeError: as in `kinds`.
        ValueError: as in `kinds`.
    """
    if any(structure != structures[0] for structure in structures):
        raise _changed()
    columns = zip(*auxes, strict=True)
    return [
        ROWS
        if all(leaf.length != () for leaf in column)
        else _kind(number, column, lambda _, dtype: kind_of_dtype(dtype))
        for number, column in enumerate(columns)
    ]


def _kind(number: int, column: Sequence[AuxLeaf], kind_of: Callable[[int, str], str]) -> str:
    first, *others = {kind_of(number, leaf.dtype) for leaf in column}
    if others:
        raise _changed()
    return first


def kind_of_dtype(dtype: str) -> str:
    """The kind of a leaf without one entry per row, by its dtype.

    Raises:
        TypeError: the leaf can be neither summed nor averaged.
    """
    if dtype == "NoneType":
        return NOTHING
    if dtype.startswith(("int", "uint")):
        return SUM
    if dtype.startswith(("float", "bfloat", "complex")):
        return MEAN
    raise TypeError(
        "A leaf of aux must have one entry per row, or be a number to sum or average. "
        f"Got {dtype}. Cast it to an integer or a float."
    )


def summed_dtype(dtype: str) -> str:
    """The dtype of a sum of integers over a window.

    The count of a micro-batch may fit its dtype although the count of the window does not: 100
    plus 100 is -56 in int8.

    Args:
        dtype: the name of the leaf's dtype.

    Returns:
        `"int32"` for an integer of fewer bits; otherwise the same dtype.
    """
    bits = dtype.removeprefix("u").removeprefix("int")
    return "int32" if bits.isdigit() and int(bits) < 32 else dtype


def _changed() -> ValueError:
    return ValueError(
        "aux must have the same structure for every micro-batch. "
        "Got different ones. Return None for what a micro-batch lacks only if all lack it."
    )


class AuxShapes:
    """Keeps the results of traces on shapes for as long as the loss functions live.

    A training loop needs the same result at every update, and each one costs a trace of the loss.
    """

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, loss_fn: Any, key: Hashable, find: Callable[[], Any]) -> Any:
        """The result for a loss function.

        Args:
            loss_fn: the function.
            key: everything else that the result depends on: structure, shapes and dtypes.
            find: () -> the result; called if it is not known yet.
        """
        # A bound method is a new object at every access, but its instance is not.
        owner = getattr(loss_fn, "__self__", loss_fn)
        # The instance may have several methods.
        key = (getattr(loss_fn, "__code__", None), key)
        try:
            known = self._found.setdefault(owner, {})
            hash(key)
        except TypeError:  # not hashable, or without weak references
            return find()
        if key not in known:
            known[key] = find()
        return known[key]
