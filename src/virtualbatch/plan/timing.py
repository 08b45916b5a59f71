"""How long the window of one size takes, for a plan."""

from collections.abc import Callable
from statistics import fmean

# Seconds of runs for one answer. A window of microseconds needs many before they tell.
ENOUGH = 0.1


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
