"""Compares contenders: checks the update of each, then times them in interleaved rounds."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from virtualbatch.bench.contender import FLOOR, OURS, PEER, WHOLE, Absent, Contender
from virtualbatch.bench.result import NOT_CHECKED, NOT_INSTALLED, RIGHT, WRONG, Row
from virtualbatch.bench.rounds import in_rounds

# Rounding in float32 changes an update by 1e-7 to 1e-5 of its length. A wrong mean of means changes
# it by percents. The limit lies between the two.
TOLERANCE = 1e-3
_MEASUREMENTS = 3

Group = Sequence[Contender | Absent]


def compared(
    groups: Sequence[Group], rounds: int, updates: Callable[[Contender], int]
) -> list[list[Row]]:
    """Checks and times contenders.

    Args:
        groups: for each case its contenders. At least one has the role `WHOLE` and one `OURS`. No
            contender has trained yet.
        rounds: number of rounds.
        updates: contender -> number of its updates in a round, see `lasting`.

    Returns:
        A row for each contender, in the same order.
    """
    present = [[entry for entry in group if isinstance(entry, Contender)] for group in groups]
    errors = [_errors(contenders) for contenders in present]
    everybody = dict(enumerate(entry for contenders in present for entry in contenders))
    runs = {k: partial(entry.train, updates(entry)) for k, entry in everybody.items()}
    found = iter(in_rounds(runs, rounds).values())
    times = [{entry.name: np.array(next(found)) for entry in contenders} for contenders in present]
    return [_rows(*entry) for entry in zip(groups, errors, times, strict=True)]


def lasting(seconds: float) -> Callable[[Contender], int]:
    """A function that returns how many updates of a contender take about `seconds`; at least 1."""

    def updates(contender: Contender) -> int:
        number = 1
        # Measure again with more updates, so that the cost of the start is spread over them.
        for _ in range(_MEASUREMENTS):
            number = max(1, round(seconds / contender.train(number)))
        return number

    return updates


def _rows(
    group: Group, errors: dict[str, float], times: dict[str, np.ndarray[Any, Any]]
) -> list[Row]:
    ours = next(times[entry.name] for entry in group if _role(entry) == OURS)
    rows = []
    for entry in group:
        if isinstance(entry, Absent):
            rows.append(Row(entry.name, PEER, NOT_INSTALLED, package=entry.package))
            continue
        error = errors.get(entry.name)
        # NaN is not below the tolerance, so it counts as wrong.
        verdict = NOT_CHECKED if error is None else RIGHT if error <= TOLERANCE else WRONG
        rows.append(
            Row(
                entry.name,
                entry.role,
                verdict,
                error=error,
                milliseconds=_quartiles(times[entry.name] * 1e3),
                times_ours=_quartiles(times[entry.name] / ours),
            )
        )
    return rows


def _role(entry: Contender | Absent) -> str:
    return entry.role if isinstance(entry, Contender) else PEER


def _errors(contenders: Sequence[Contender]) -> dict[str, float]:
    """The distance of each first update from the uncut batch's update, relative to its length."""
    moved = {}
    for contender in contenders:
        before = _vector(contender)
        contender.train(1)
        moved[contender.name] = _vector(contender) - before
    expected = moved[next(entry.name for entry in contenders if entry.role == WHOLE)]
    length = np.linalg.norm(expected)
    return {
        entry.name: float(np.linalg.norm(moved[entry.name] - expected) / length)
        for entry in contenders
        if entry.role != FLOOR
    }


def _vector(contender: Contender) -> np.ndarray[Any, Any]:
    # In float64, so that the difference of two weights is not rounded again.
    return np.concatenate([np.ravel(w).astype("float64") for w in contender.weights()])


def _quartiles(found: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    low, median, high = np.quantile(found, (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)
