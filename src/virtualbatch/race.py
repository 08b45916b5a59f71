"""Which of some sizes is the fastest, where every time is disturbed.

What else a machine does comes and goes within seconds, and slows whatever runs then. So sizes are
timed in turns, the same number of times, and compared by their means: in traces of ten seconds of a
busy machine, that found a size within 5 % of the fastest more often than the shortest times did.
"""

from statistics import fmean

# After so many looks, only sizes that took no longer than this, against the fastest, get another.
_NEAR = {1: 1.3, 3: 1.15}
_LOOKS = 9


class Race:
    """Times of sizes, as they are taken."""

    def __init__(self) -> None:
        self._looks: dict[int, list[float]] = {}

    def tell(self, size: int, seconds: float) -> None:
        """Takes one look at a size.

        Args:
            size: rows of a micro-batch.
            seconds: what the whole batch took.
        """
        self._looks.setdefault(size, []).append(seconds)

    def forget(self, size: int) -> None:
        """Takes a size out of the race, because it does not fit."""
        self._looks.pop(size, None)

    @property
    def first(self) -> dict[int, float]:
        """The first look at each size, by size."""
        return {size: self._looks[size][0] for size in sorted(self._looks)}

    def near(self) -> list[int]:
        """The sizes that may be the fastest, smallest first."""
        near = sorted(self._looks)
        for looks, margin in _NEAR.items():
            if min((len(self._looks[size]) for size in near), default=0) < looks:
                break
            means = {size: fmean(self._looks[size][:looks]) for size in near}
            near = [size for size in near if means[size] <= margin * min(means.values())]
        return near

    def next_look(self) -> int | None:
        """The size to be timed again; None if all have been timed often enough."""
        near = self.near()
        size = min(near, key=lambda size: len(self._looks[size]), default=None)
        done = size is None or len(near) == 1 or len(self._looks[size]) >= _LOOKS
        return None if done else size

    def seconds(self) -> dict[int, float]:
        """The mean time of each size; of those in the race, over as many turns."""
        near = self.near()
        turns = min((len(self._looks[size]) for size in near), default=0)
        return {
            size: fmean(looks[:turns] if size in near else looks)
            for size, looks in sorted(self._looks.items())
        }
