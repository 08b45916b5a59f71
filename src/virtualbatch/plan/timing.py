"""How long windows take, for a plan: the time of one size, and which size is the fastest."""

from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

# Seconds of runs for one answer. A window of microseconds needs many before they tell.
ENOUGH = 0.1
# A size that takes this much longer than the fastest is left, if it was timed EARLY times.
HOPELESS = 1.3
EARLY = 3

# A size that takes this much longer is left at once: disturbances seldom double a time.
_FAR_BEHIND = 2.0
# Means are off by a few percent, and a size is to be within 5 % of the fastest (NEARLY_AS_FAST). So
# less is asked of the means.
ALIKE = 0.02


class TimeBudget(NamedTuple):
    """How long sizes are compared for.

    Fields:
        seconds: after which nothing is timed any more. Where a window takes a second that is one
            measurement or two of each size; what they cannot tell apart is in docs/guides/size.md.
        reserve: of them, seconds that have to be left for measurements once a size is there that
            was not met before.
        rounds: measurements of each size that may be the fastest.
    """

    seconds: float = 10.0
    reserve: float = 2.0
    rounds: int = 9


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
    are timed in rounds, one measurement of each, and the mean of a size is its time. A shortest
    time would be that of whichever size met the quietest moment. `benchmarks/races.py` compares
    ways to choose.
    """

    def __init__(self) -> None:
        # size -> seconds, in the order in which they were told.
        self._told: dict[int, list[float]] = {}

    def tell(self, size: int, seconds: float) -> None:
        """Takes one measurement of a size.

        Args:
            size: rows of a micro-batch.
            seconds: what the whole batch took.
        """
        self._told.setdefault(size, []).append(seconds)

    def forget(self, size: int) -> None:
        """Takes a size out, because it does not fit."""
        self._told.pop(size, None)

    def seconds(self) -> dict[int, float]:
        """The mean time of each size, smallest size first."""
        return {size: fmean(self._told[size]) for size in sorted(self._told)}

    def next_measurement(self, rounds: int) -> int | None:
        """The size to be timed again: of those that may be the fastest the one least timed.

        Args:
            rounds: measurements that each of them is to have.

        Returns:
            A size; None if they have them, or only one is left.
        """
        seconds = self.seconds()
        counts = {size: len(self._told[size]) for size in seconds}
        least = min(seconds.values(), default=0.0)
        near = [size for size in seconds if seconds[size] <= HOPELESS * least]
        early = [
            size
            for size in seconds
            if counts[size] < min(rounds, EARLY) and seconds[size] <= _FAR_BEHIND * least
        ]
        if len(seconds) < 2 or (len(near) < 2 and not early):
            return None
        size = min(sorted({*near, *early}), key=counts.__getitem__)
        return size if counts[size] < rounds else None

    def chosen(self) -> tuple[int, int]:
        """(the smallest size that is about as fast as the fastest, the fastest), by their means.

        At least one size was timed.
        """
        seconds = self.seconds()
        fastest = min(seconds, key=seconds.__getitem__)
        most = (1 + ALIKE) * seconds[fastest]
        return min(size for size in seconds if seconds[size] <= most), fastest
