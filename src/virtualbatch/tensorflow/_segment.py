"""Micro-batches of one shape, each reached by its number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.tensorflow._arrays import after, as_tensor, map_lists, specs
from virtualbatch.window.row_list import shown


class Segment(NamedTuple):
    """Micro-batches of one shape.

    Fields:
        count: how many; a Python int, or an int32 scalar where the rows are dynamic.
        source: nested structure of arrays that they are cut from.
        cut: (source, number within the segment) -> micro-batch.
        rows: number within the segment -> its rows, a Python int or an int32 scalar; None where a
            weight says what a micro-batch counts and its rows cannot be told.
        holds_lists: whether `cut` marks lists with one entry per row.
        entries: 0, at run time, where its first micro-batch has no rows; then there is no other.
            None where it is known to have some.
    """

    count: Any
    source: Any
    cut: Callable[[Any, Any], Any]
    rows: Callable[[Any], Any]
    holds_lists: bool = False
    entries: Any = None

    def get(self, i: Any) -> Any:
        """The micro-batch of that number."""
        found = self.cut(self.source, i)
        return map_lists(shown, found) if self.holds_lists else found

    def with_rows(self, i: Any, rows: int) -> Any:
        """Specs of that micro-batch with another number of rows, lists with as many entries."""
        found = specs(tf.nest.map_structure(as_tensor, self.cut(self.source, i)), rows)
        return map_lists(lambda x: shown(x.stretched(rows)), found) if self.holds_lists else found

    def after(self, operations: list[Any]) -> "Segment":
        """The same micro-batches, which cannot be read before the operations have run."""
        return self._replace(source=after(operations, self.source))


def single(microbatch: Any, rows: Any) -> Segment:
    """One micro-batch as a segment."""
    return Segment(1, microbatch, lambda source, _: source, lambda _: rows)
