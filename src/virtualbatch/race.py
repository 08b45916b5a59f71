"""Which of some sizes is the fastest, where every time is disturbed.

What else a machine does comes and goes within seconds, and slows whatever runs then. So sizes are
timed in turns, and compared by their means over the same turns: in traces of a busy machine that
found a size within 5 % of the fastest more often than the shortest times did.
"""

from statistics import fmean

# What takes longer than this, against the fastest, gets no further look; nor does, after three
# turns, what takes longer than that.
_FAR, _TURNS, _FAR_AFTER_TURNS = 1.3, 3, 1.15


class Race:
    """Times of sizes, as they are taken."""

    def __init__(self) -> None:
        # By when they were last looked at.
        self._looks: dict[int, list[float]] = {}

    def tell(self, size: int, seconds: float) -> None:
        """Takes one look at a size.

        Args:
            size: rows of a micro-batch.
            seconds: what the whole batch took.
        """
        self._looks[size] = [*self._looks.pop(size, []), seconds]

    def forget(self, size: int) -> None:
        """Takes a size out of the race, because it does not fit."""
        self._looks.pop(size, None)

    def near(self) -> list[int]:
        """The sizes that may be the fastest, smallest first."""
        means = {size: fmean(self._looks[size]) for size in sorted(self._looks)}
        near = [size for size in means if means[size] <= _FAR * min(means.values())]
        if self._turns(near) < _TURNS:
            return near
        means = self._means(near)
        return [size for size in near if means[size] <= _FAR_AFTER_TURNS * min(means.values())]

    def next_look(self, looks: int) -> int | None:
        """The size to be timed again.

        Args:
            looks: how many every size that may be the fastest is to have.

        Returns:
            A size; None if they have them, or only one is left.
        """
        near = self.near()
        if len(near) < 2 or self._turns(near) >= looks:
            return None
        return next(size for size in self._looks if size in near)

    def seconds(self) -> dict[int, float]:
        """The mean time of each size; of those that may be the fastest, over the same turns."""
        alone = {size: fmean(self._looks[size]) for size in sorted(self._looks)}
        return alone | self._means(self.near())

    def _turns(self, sizes: list[int]) -> int:
        """The looks that each of some sizes has had."""
        return min((len(self._looks[size]) for size in sizes), default=0)

    def _means(self, sizes: list[int]) -> dict[int, float]:
        """Means over the last turns, in which all of some sizes ran."""
        turns = self._turns(sizes)
        return {size: fmean(self._looks[size][-turns:]) for size in sizes}
