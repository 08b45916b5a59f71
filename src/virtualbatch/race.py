"""Which of some sizes is the fastest, where every time is disturbed.

What else a machine does comes and goes within seconds, and slows whatever runs then. So sizes are
timed in turns, and a time is taken for that of the size times the tempo of the turn, the same for
all that ran in it. A shortest time would be that of whichever size met the quietest moment.
"""

from statistics import fmean

# A size that takes longer than this, against the fastest, gets no further look; nor does, after
# three looks, one that takes longer than that.
_FAR, _FEW, _FAR_AFTER_FEW = 1.3, 3, 1.15
# Alternations between the tempos of turns and the times of sizes; they settle within a few.
_ROUNDS = 10


class Race:
    """Times of sizes, as they are taken."""

    def __init__(self) -> None:
        # size -> seconds, of each turn. In a turn a size runs once.
        self._turns: list[dict[int, float]] = []

    def tell(self, size: int, seconds: float) -> None:
        """Takes one look at a size.

        Args:
            size: rows of a micro-batch.
            seconds: what the whole batch took.
        """
        if not self._turns or size in self._turns[-1]:
            self._turns.append({})
        self._turns[-1][size] = seconds

    def forget(self, size: int) -> None:
        """Takes a size out of the race, because it does not fit."""
        for turn in self._turns:
            turn.pop(size, None)

    def looks(self, size: int) -> int:
        """How often a size was timed."""
        return sum(size in turn for turn in self._turns)

    def seconds(self) -> dict[int, float]:
        """The time of each size, in a turn of mean tempo; by size.

        The model is seconds = time of the size x tempo of the turn, fitted by turns to either.
        """
        turns = [turn for turn in self._turns if turn]
        sizes = sorted({size for turn in turns for size in turn})
        found = dict.fromkeys(sizes, 1.0)
        tempos: list[float] = []
        for _ in range(_ROUNDS):
            tempos = [fmean(turn[size] / found[size] for size in turn) for turn in turns]
            for size in sizes:
                found[size] = fmean(
                    turn[size] / tempo
                    for turn, tempo in zip(turns, tempos, strict=True)
                    if size in turn
                )
        return {size: found[size] * fmean(tempos) for size in sizes}

    def near(self) -> list[int]:
        """The sizes that may be the fastest, smallest first."""
        found = self.seconds()
        fastest = min(found.values(), default=0.0)
        return [
            size
            for size in found
            if found[size] <= (_FAR if self.looks(size) < _FEW else _FAR_AFTER_FEW) * fastest
        ]

    def next_look(self, looks: int) -> int | None:
        """The size to be timed again.

        Args:
            looks: how many every size that may be the fastest is to have.

        Returns:
            A size; None if they have them, or only one is left.
        """
        near = self.near()
        if len(near) < 2 or min(self.looks(size) for size in near) >= looks:
            return None
        waiting = [size for size in near if size not in self._turns[-1]]
        return min(waiting or near)
