"""Runs of micro-batches of equal shape, and a window that is made of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from virtualbatch.jax._arrays import map_arrays
from virtualbatch.jax._rows import map_lists
from virtualbatch.window.row_list import shown


@dataclass(frozen=True)
class Segment:
    """Micro-batches of equal shape.

    Fields:
        count: how many.
        rows: rows of each; a Python int, or None where a weight says what a micro-batch counts
            and its rows cannot be told.
        get: (index, an int or a traced int32 scalar) -> that micro-batch.
        marked: the same, where a `RowList` stands for each list with one entry per row; None where
            there are no such lists.
    """

    count: int
    rows: Any
    get: Callable[[Any], Any]
    marked: Callable[[Any], Any] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Cut:
    """A window, cut.

    Fields:
        segments: its micro-batches, in the order in which they run.
        interleaved: whether micro-batch i of the first segment has every count-th row from row i
            on, instead of the next rows.
    """

    segments: list[Segment]
    interleaved: bool = False

    @property
    def count(self) -> int:
        """Micro-batches of the window."""
        return sum(segment.count for segment in self.segments)

    @property
    def rows(self) -> list[Any]:
        """Rows of each micro-batch, None where they cannot be told."""
        return [segment.rows for segment in self.segments for _ in range(segment.count)]

    @property
    def rows_in_order(self) -> list[Any]:
        """The same where each has the next rows of the batch; else Nones."""
        return [None] * self.count if self.interleaved else self.rows

    def microbatches(self) -> Iterator[Any]:
        """The micro-batches, one after another, each made when it is asked for."""
        for segment in self.segments:
            for k in range(segment.count):
                yield segment.get(k)


def specs(segment: Segment, rows: int) -> Any:
    """A micro-batch as it would be with another number of rows: types in place of its arrays."""

    def spec(leaf: Any) -> Any:
        found = jax.typeof(leaf)
        return found.update(shape=(rows, *found.shape[1:]))

    result: list[Any] = []
    # Abstractly, so that no micro-batch is made for it.
    get = segment.marked or segment.get
    jax.eval_shape(lambda: result.append(map_arrays(spec, get(0))))
    return map_lists(lambda x: shown(x.stretched(rows)), result[0])
