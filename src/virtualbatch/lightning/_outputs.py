"""Combines what a training step returns beside its loss, for the whole batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from virtualbatch.lightning._pieces import Counts, Piece, counts, mean


class Outputs:
    """Keeps what the training step returns for micro-batches.

    Tensors are detached. A tensor with one entry per row is concatenated. Other floating values are
    averaged by rows, and integers are summed. For anything else, the value of the last micro-batch
    is kept.
    """

    def __init__(self) -> None:
        self._found: list[tuple[_Leafed, dict[str, Any]]] | None = None

    def add(self, piece: Piece, extra: dict[str, Any] | None) -> None:
        """Adds the values of a micro-batch; None if it returned its loss alone."""
        if extra is None:
            return
        detached = pytree.tree_map(_detached, extra)
        self._found = [*(self._found or []), (_Leafed(piece.rows, counts(piece)), detached)]

    def clear(self) -> None:
        """Forgets everything."""
        self._found = None

    def together(self) -> dict[str, Any] | None:
        """The values of the whole batch, by name; None if there are none."""
        if self._found is None:
            return None
        names = dict.fromkeys(name for _, extra in self._found for name in extra)
        return {
            name: _together([(x, extra[name]) for x, extra in self._found if name in extra])
            for name in names
        }


class _Leafed(NamedTuple):
    rows: int | None
    counts: Counts


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x


def _together(found: Sequence[tuple[_Leafed, Any]]) -> Any:
    flat = [pytree.tree_flatten(value) for _, value in found]
    _, structure = flat[-1]
    if len(found) == 1 or any(other != structure for _, other in flat):
        return found[-1][1]
    pieces = [piece for piece, _ in found]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.tree_unflatten([_leaf(pieces, column) for column in columns], structure)


def _leaf(pieces: Sequence[_Leafed], column: Sequence[Any]) -> Any:
    first = column[0]
    if isinstance(first, torch.Tensor) and all(isinstance(x, torch.Tensor) for x in column):
        pairs = zip(pieces, column, strict=True)
        if all(x.dim() and x.shape[0] == piece.rows for piece, x in pairs):
            return torch.cat(list(column))
        if any(x.shape != first.shape for x in column) or first.dtype == torch.bool:
            return column[-1]
        if not first.is_floating_point():
            return sum(column[1:], first)
        return mean(column, [piece.counts.by_rows for piece in pieces], first).to(first.dtype)
    if all(type(x) is int for x in column):
        return sum(column)
    if all(type(x) is float for x in column):
        rows = [float(piece.counts.by_rows) for piece in pieces]
        return sum(x * n for x, n in zip(column, rows, strict=True)) / sum(rows)
    return column[-1]
