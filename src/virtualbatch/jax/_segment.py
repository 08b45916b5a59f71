"""Segments, which are runs of micro-batches of equal shape, and windows made of segments."""

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
        count: the number of micro-batches.
        rows: the rows of each micro-batch, a Python int. None if the rows are not known; then a
            weight says what a micro-batch counts.
        get: (index, an int or a traced int32 scalar) -> that micro-batch.
        marked: like `get`, but with a `RowList` in place of each list with one entry per row; None
            if there are no such lists.
    """

    count: int
    rows: Any
    get: Callable[[Any], Any]
    marked: Callable[[Any], Any] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Cut:
    """A window, cut.

    Fields:
        segments: the micro-batches, in the order in which they run.
        interleaved: whether micro-batch i of the first segment has every count-th row from row i
            on. Otherwise each micro-batch has the next rows.
    """

    segments: list[Segment]
    interleaved: bool = False

    @property
    def count(self) -> int:
        """The number of micro-batches of the window."""
        return sum(segment.count for segment in self.segments)

    @property
    def rows(self) -> list[Any]:
        """The rows of each micro-batch, None where they are not known."""
        return [segment.rows for segment in self.segments for _ in range(segment.count)]

    @property
    def rows_in_order(self) -> list[Any]:
        """The rows of each micro-batch if each has the next rows of the batch; otherwise Nones."""
        return [None] * self.count if self.interleaved else self.rows

    def microbatches(self) -> Iterator[Any]:
        """Yields the micro-batches. Each one is made only when it is needed."""
        for segment in self.segments:
            for k in range(segment.count):
                yield segment.get(k)


def specs(segment: Segment, rows: int) -> Any:
    """A micro-batch with another number of rows, and with types in place of its arrays."""

    def spec(leaf: Any) -> Any:
        found = jax.typeof(leaf)
        return found.update(shape=(rows, *found.shape[1:]))

    result: list[Any] = []
    # eval_shape, so that no real micro-batch is made.
    get = segment.marked or segment.get
    jax.eval_shape(lambda: result.append(map_arrays(spec, get(0))))
    return map_lists(lambda x: shown(x.stretched(rows)), result[0])
