"""Times a trainer from inside, without its start and its end."""

import time
from collections.abc import Iterator, Sequence
from typing import Any


class TimedPieces:
    """The micro-batches of several updates, for a trainer that reads them one after another.

    Args:
        pieces: the micro-batches of one update.
        updates: number of updates.
    """

    def __init__(self, pieces: Sequence[Any], updates: int):
        self._pieces = pieces
        self._updates = updates
        self._start = self._end = 0.0

    def __len__(self) -> int:
        return len(self._pieces) * self._updates

    def __iter__(self) -> Iterator[Any]:
        self._start = time.perf_counter()
        for _ in range(self._updates):
            yield from self._pieces

    def updated(self) -> None:
        """Notes the end of an update. The last call before `seconds` is read counts."""
        self._end = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of one update."""
        return (self._end - self._start) / self._updates
