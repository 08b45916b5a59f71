"""Measurements in interleaved rounds, so that other load slows all contenders alike."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

_Name = TypeVar("_Name", bound=Hashable)


def in_rounds(runs: Mapping[_Name, Callable[[], float]], rounds: int) -> dict[_Name, list[float]]:
    """Runs every measurement once in every round.

    Args:
        runs: name -> measurement, which returns its time.
        rounds: number of rounds.

    Returns:
        The times of each measurement, one per round.
    """
    times: dict[_Name, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        # The caches depend on what ran before, so every second round has the reverse order.
        for name in list(runs)[:: -1 if number % 2 else 1]:
            times[name].append(runs[name]())
    return times


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call, which must wait for its result."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
