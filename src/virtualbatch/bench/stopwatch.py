"""Timing a trainer from inside: its start and its end are not counted."""

import time
from collections.abc import Iterator, Sequence
from typing import Any


class TimedPieces:
    """Micro-batches of so many updates, which a trainer asks for one after another.

    Args:
        pieces: the micro-batches of one update.
        updates: how often they are gone through.
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
        """Tells that an update is made; the last call counts."""
        self._end = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of one update."""
        return (self._end - self._start) / self._updates
