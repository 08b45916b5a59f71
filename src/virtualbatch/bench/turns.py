"""Contenders taking turns: the update of each is compared, then each is timed in every round."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from virtualbatch.bench.contender import FLOOR, OURS, WHOLE, Absent, Contender
from virtualbatch.bench.result import NOT_CHECKED, NOT_INSTALLED, RIGHT, WRONG, Row

# Rounding in float32 moves an update by 1e-7 to 1e-5 of its length; a mean of means moves it by
# percents. Between them lie two decimal orders.
TOLERANCE = 1e-3
_WARM_UPS = 3


def compared(
    entries: Sequence[Contender | Absent], rounds: int, seconds_per_turn: float
) -> list[Row]:
    """Checks and times contenders.

    Args:
        entries: one of role `WHOLE` and one of role `OURS` at least; nobody has trained yet.
        rounds: turns of each contender.
        seconds_per_turn: a turn has as many updates as take about so long, one at least.

    Returns:
        A row for each entry, in the same order.
    """
    contenders = [entry for entry in entries if isinstance(entry, Contender)]
    errors = _errors(contenders)
    times = _times(contenders, rounds, seconds_per_turn)
    ours = times[next(entry.name for entry in contenders if entry.role == OURS)]
    rows = []
    for entry in entries:
        if isinstance(entry, Absent):
            rows.append(Row(entry.name, "peer", NOT_INSTALLED, package=entry.package))
            continue
        error = errors.get(entry.name)
        verdict = NOT_CHECKED if error is None else RIGHT if error <= TOLERANCE else WRONG
        found = times[entry.name] * 1e3
        rows.append(
            Row(
                entry.name,
                entry.role,
                verdict,
                error=error,
                milliseconds=_quartiles(found),
                times_ours=_quartiles(times[entry.name] / ours),
            )
        )
    return rows


def _errors(contenders: Sequence[Contender]) -> dict[str, float]:
    """How far the first update of each is from that of the uncut batch, relative to its length."""
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
    # In float64, or the difference of two large weights would be rounded once more.
    return np.concatenate([np.ravel(w).astype("float64") for w in contender.weights()])


def _times(
    contenders: Sequence[Contender], rounds: int, seconds_per_turn: float
) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds that an update of each took, round by round."""
    updates = {}
    for contender in contenders:
        contender.train(_WARM_UPS)
        updates[contender.name] = max(1, round(seconds_per_turn / contender.train(_WARM_UPS)))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        # Whoever comes after a slow one may find other caches: every order is turned round.
        for contender in contenders[:: -1 if turn % 2 else 1]:
            times[contender.name].append(contender.train(updates[contender.name]))
    return {name: np.array(found) for name, found in times.items()}


def _quartiles(found: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    low, median, high = np.quantile(found, (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)
