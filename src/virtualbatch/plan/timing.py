"""How long windows take, for a plan: the time of one size, and which size is the fastest."""

import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

# Seconds of runs for one answer. A window of microseconds needs many before they tell.
ENOUGH = 0.1

# What one time is off by, as a share of it, before times tell; and for how many times that counts.
_EXPECTED, _WEIGHT = 0.1, 3
# A size is out if it is slower by this many standard errors, of its time and of the fastest.
_SURE = 2.0
# Alternations between the loads of rounds and the times of sizes; they settle within a few.
_ALTERNATIONS = 10


class TimeBudget(NamedTuple):
    """How long sizes are compared for.

    Fields:
        seconds: after which nothing is timed any more. Where a window takes a second that is one
            measurement or two of each size; what they cannot tell apart is in docs/plan.md.
        reserve: of them, seconds that have to be left for measurements once a size is there that
            was not met before.
        settled: standard errors, as a share, that the times of sizes that may be the fastest are
            to have before others are timed because of them.
        precise: the same at the end. With the default, a smaller size is surely as good where it
            is within 2 %.
    """

    seconds: float = 10.0
    reserve: float = 2.0
    settled: float = 0.075
    precise: float = 0.01


class Timing:
    """Times of one window. Its first run loads what later ones find, so it does not count.

    Args:
        run: runs the window and waits for it; () -> seconds that it took.
        load: loads the same by less than a run; None if only a run does.
    """

    def __init__(self, run: Callable[[], float], load: Callable[[], None] | None = None):
        self._run = run
        self._load = load
        self._is_loaded = False
        # Of runs that no answer told of yet.
        self._times: list[float] = []

    def run(self) -> None:
        """Runs the window, also where something else of it is to be measured; the time counts."""
        seconds = self._run()
        if self._is_loaded:
            self._times.append(seconds)
        self._is_loaded = True

    def seconds(self) -> float:
        """The mean run since the last answer, with as many more as it takes to tell.

        Not the shortest: windows that are run twice for an answer would then look faster than
        those that are run once.
        """
        if not self._is_loaded and self._load is not None:
            self._load()
            self._is_loaded = True
        while sum(self._times) < ENOUGH:
            self.run()
        found, self._times = fmean(self._times), []
        return found


class FastestSize:
    """Which of some sizes is the fastest, where every time is disturbed.

    What else a machine does comes and goes within seconds, and slows whatever runs then. So sizes
    are timed in rounds, and a time is taken for that of the size times the load of the round, the
    same for all that ran in it. How far times are off all the same is seen from what that leaves
    over; a size is given up once it is slower by more than that can explain, as in the elimination
    of [Even-Dar et al. 2006](https://jmlr.org/papers/v7/evendar06a.html). A shortest time would be
    that of whichever size met the quietest moment.
    """

    def __init__(self) -> None:
        # size -> seconds, of each round. In a round a size runs once.
        self._rounds: list[dict[int, float]] = []

    def tell(self, size: int, seconds: float) -> None:
        """Takes one measurement of a size.

        Args:
            size: rows of a micro-batch.
            seconds: what the whole batch took.
        """
        if not self._rounds or size in self._rounds[-1]:
            self._rounds.append({})
        self._rounds[-1][size] = seconds

    def forget(self, size: int) -> None:
        """Takes a size out, because it does not fit."""
        for times in self._rounds:
            times.pop(size, None)
        self._rounds = [times for times in self._rounds if times]

    def seconds(self) -> dict[int, float]:
        """The time of each size, in a round of mean load; by size.

        The model is seconds = time of the size x load of the round, fitted to each in alternation.
        """
        found, loads = self._fitted()
        return {size: found[size] * fmean(loads) for size in found}

    def errors(self) -> dict[int, float]:
        """The standard error of the time of each size, as a share of it; by size."""
        found, loads = self._fitted()
        left_over = [
            times[size] / (found[size] * load) - 1
            for times, load in zip(self._rounds, loads, strict=True)
            for size in times
        ]
        free = max(0, len(left_over) - len(found) - len(loads) + 1)
        squares = _WEIGHT * _EXPECTED**2 + sum(x * x for x in left_over)
        spread = math.sqrt(squares / (_WEIGHT + free))
        counts = {size: sum(size in times for times in self._rounds) for size in found}
        return {size: spread / math.sqrt(counts[size]) for size in found}

    def near(self) -> list[int]:
        """The sizes that may be the fastest, smallest first."""
        found, errors = self.seconds(), self.errors()
        least = min((found[m] * (1 + _SURE * errors[m]) for m in found), default=0.0)
        return [size for size in found if found[size] * (1 - _SURE * errors[size]) <= least]

    def next_measurement(self, error: float) -> int | None:
        """The size to be timed again.

        Args:
            error: the standard error, as a share, that every size near the fastest is to have.

        Returns:
            A size; None if they have it, or only one is left.
        """
        near, errors = self.near(), self.errors()
        if len(near) < 2 or max(errors[size] for size in near) <= error:
            return None
        waiting = [size for size in near if size not in self._rounds[-1]]
        return min(waiting or near)

    def chosen(self, tolerance: float) -> tuple[int, int]:
        """What the times so far speak for.

        The better they are known the more they let a smaller size win. The fastest is that which
        is so with its error added, so that one lucky measurement does not decide.

        Args:
            tolerance: by how much more time a smaller size may take, as a share.

        Returns:
            (the smallest size that is surely within the tolerance of the fastest, the fastest).
            At least one size was timed.
        """
        found, errors = self.seconds(), self.errors()
        fastest = min(found, key=lambda size: found[size] * (1 + errors[size]))
        most = (1 + tolerance) * found[fastest]
        sure = [
            size
            for size in found
            if found[size] * (1 + _SURE * math.hypot(errors[size], errors[fastest])) <= most
        ]
        return min([*sure, fastest]), fastest

    def _fitted(self) -> tuple[dict[int, float], list[float]]:
        """Times of sizes, and loads of rounds."""
        sizes = sorted({size for times in self._rounds for size in times})
        found = dict.fromkeys(sizes, 1.0)
        loads: list[float] = []
        for _ in range(_ALTERNATIONS):
            loads = [fmean(times[size] / found[size] for size in times) for times in self._rounds]
            for size in sizes:
                found[size] = fmean(
                    times[size] / load
                    for times, load in zip(self._rounds, loads, strict=True)
                    if size in times
                )
        return found, loads
