"""Times for a plan: how long a window of one size takes, and which size is the fastest."""

from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

# Seconds of runs for one measurement. A window of microseconds needs many runs for a usable mean.
ENOUGH = 0.1
# A size this many times slower than the fastest is dropped after EARLY measurements.
HOPELESS = 1.3
EARLY = 3

# A size this many times slower is dropped at once: other load seldom doubles a time.
_FAR_BEHIND = 2.0
# The chosen size must be within 5 % of the fastest (NEARLY_AS_FAST). Means are off by a few
# percent, so they must be closer than that.
ALIKE = 0.02


class TimeBudget(NamedTuple):
    """How much time may be spent on comparing sizes.

    Fields:
        seconds: the time after which timing ends. If a window takes a second, each size gets one or
            two measurements; docs/notes/planning.md says which differences they cannot show.
        reserve: seconds that must be left for measurements after a new size is built. Otherwise no
            new size is tried.
        rounds: measurements of each size that may be the fastest.
    """

    seconds: float = 10.0
    reserve: float = 2.0
    rounds: int = 9


class Timing:
    """Times of one window. The first run is a warm-up and does not count.

    Args:
        run: runs the window and waits for it; () -> seconds that it took.
        load: a cheaper warm-up than a run; None if there is none.
    """

    def __init__(self, run: Callable[[], float], load: Callable[[], None] | None = None):
        self._run = run
        self._load = load
        self._is_loaded = False
        # The times of runs that are not yet part of a measurement.
        self._times: list[float] = []

    def run(self) -> None:
        """Runs the window once. The time counts, also if the run is for another measurement."""
        seconds = self._run()
        if self._is_loaded:
            self._times.append(seconds)
        self._is_loaded = True

    def seconds(self) -> float:
        """The mean time of a run since the last measurement. Runs the window as often as needed.

        The shortest time would be wrong: a window that runs twice in a measurement would look
        faster than one that runs once.
        """
        if not self._is_loaded and self._load is not None:
            self._load()
            self._is_loaded = True
        while sum(self._times) < ENOUGH:
            self.run()
        found, self._times = fmean(self._times), []
        return found


class FastestSize:
    """Finds the fastest of some sizes although other load disturbs the times.

    Other load on a machine comes and goes within seconds. So sizes are timed in interleaved rounds,
    one measurement of each size in a round, and a busy moment slows all of them alike. The time of
    a size is the mean of its measurements: the shortest would depend on which size ran in the
    quietest moment. `benchmarks/races.py` compares ways to choose.
    """

    def __init__(self) -> None:
        # size -> seconds of each measurement, in order.
        self._told: dict[int, list[float]] = {}

    def tell(self, size: int, seconds: float) -> None:
        """Takes one measurement of a size.

        Args:
            size: rows of a micro-batch.
            seconds: the time of the whole batch.
        """
        self._told.setdefault(size, []).append(seconds)

    def forget(self, size: int) -> None:
        """Removes a size that does not fit."""
        self._told.pop(size, None)

    def seconds(self) -> dict[int, float]:
        """The mean time of each size, smallest size first."""
        return {size: fmean(self._told[size]) for size in sorted(self._told)}

    def next_measurement(self, rounds: int) -> int | None:
        """The size to time next: of all that may be the fastest, the one with fewest measurements.

        Args:
            rounds: measurements that each such size needs.

        Returns:
            A size; None if each has enough measurements, or only one size is left.
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
        """The smallest size about as fast as the fastest, and the fastest, by their mean times.

        At least one size must be timed.
        """
        seconds = self.seconds()
        fastest = min(seconds, key=seconds.__getitem__)
        most = (1 + ALIKE) * seconds[fastest]
        return min(size for size in seconds if seconds[size] <= most), fastest
