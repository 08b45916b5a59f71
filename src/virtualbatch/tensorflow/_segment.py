"""Micro-batches of one shape, where a number selects a micro-batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.tensorflow._arrays import after, as_tensor, map_lists, specs
from virtualbatch.window.row_list import shown


class Segment(NamedTuple):
    """Micro-batches of one shape.

    Fields:
        count: the number of micro-batches; a Python int, or an int32 scalar if rows are dynamic.
        source: nested structure of arrays that the micro-batches are cut from.
        cut: (source, number within the segment) -> micro-batch.
        rows: number within the segment -> rows of the micro-batch, a Python int or an int32 scalar.
            None if the rows are not known; then a weight says what a micro-batch counts.
        holds_lists: whether `cut` marks lists with one entry per row.
        entries: a scalar that is 0 at run time if the first micro-batch has no rows; then it is the
            only micro-batch. None if it is known to have rows.
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
        """Specs of a micro-batch with another number of rows. Lists get as many entries."""
        found = specs(tf.nest.map_structure(as_tensor, self.cut(self.source, i)), rows)
        return map_lists(lambda x: shown(x.stretched(rows)), found) if self.holds_lists else found

    def after(self, operations: list[Any]) -> "Segment":
        """The same micro-batches, which cannot be read before the operations have run."""
        return self._replace(source=after(operations, self.source))


def single(microbatch: Any, rows: Any) -> Segment:
    """One micro-batch as a segment."""
    return Segment(1, microbatch, lambda source, _: source, lambda _: rows)
