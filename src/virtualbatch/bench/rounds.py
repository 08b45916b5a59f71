"""Measurements in interleaved rounds: what else the machine does meets all that are compared."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

_Name = TypeVar("_Name", bound=Hashable)


def in_rounds(runs: Mapping[_Name, Callable[[], float]], rounds: int) -> dict[_Name, list[float]]:
    """Runs everybody once in every round.

    Args:
        runs: what is measured; each returns its time.
        rounds: how many.

    Returns:
        The times of each, round by round.
    """
    times: dict[_Name, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        # Whoever comes after a slow one may find other caches, so every second round goes back.
        for name in list(runs)[:: -1 if number % 2 else 1]:
            times[name].append(runs[name]())
    return times


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call, which must wait for its result."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
