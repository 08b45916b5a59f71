"""Which of some sizes is the fastest, where every time is disturbed.

What else a machine does comes and goes within seconds, and slows whatever runs then. So sizes are
timed in turns, and a time is taken for that of the size times the tempo of the turn, the same for
all that ran in it. How far times are off all the same is seen from what that leaves over; a size
is out of the race once it is slower by more than that can explain, as in the elimination of
[Even-Dar et al. 2006](https://jmlr.org/papers/v7/evendar06a.html). A shortest time would be that
of whichever size met the quietest moment.
"""

import math
from statistics import fmean

# What one time is off by, as a share of it, before times tell; and for how many times that counts.
_EXPECTED, _WEIGHT = 0.1, 3
# A size is out if it is slower by this many standard errors, of its time and of the fastest.
_SURE = 2.0
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
        self._turns = [turn for turn in self._turns if turn]

    def seconds(self) -> dict[int, float]:
        """The time of each size, in a turn of mean tempo; by size.

        The model is seconds = time of the size x tempo of the turn, fitted by turns to either.
        """
        found, tempos = self._fitted()
        return {size: found[size] * fmean(tempos) for size in found}

    def errors(self) -> dict[int, float]:
        """The standard error of the time of each size, as a share of it; by size."""
        found, tempos = self._fitted()
        left_over = [
            turn[size] / (found[size] * tempo) - 1
            for turn, tempo in zip(self._turns, tempos, strict=True)
            for size in turn
        ]
        free = max(0, len(left_over) - len(found) - len(tempos) + 1)
        squares = _WEIGHT * _EXPECTED**2 + sum(x * x for x in left_over)
        spread = math.sqrt(squares / (_WEIGHT + free))
        looks = {size: sum(size in turn for turn in self._turns) for size in found}
        return {size: spread / math.sqrt(looks[size]) for size in found}

    def near(self) -> list[int]:
        """The sizes that may be the fastest, smallest first."""
        found, errors = self.seconds(), self.errors()
        least = min((found[m] * (1 + _SURE * errors[m]) for m in found), default=0.0)
        return [size for size in found if found[size] * (1 - _SURE * errors[size]) <= least]

    def next_look(self, error: float) -> int | None:
        """The size to be timed again.

        Args:
            error: the standard error, as a share, that every size in the race is to have.

        Returns:
            A size; None if they have it, or only one is left.
        """
        near, errors = self.near(), self.errors()
        if len(near) < 2 or max(errors[size] for size in near) <= error:
            return None
        waiting = [size for size in near if size not in self._turns[-1]]
        return min(waiting or near)

    def chosen(self, tolerance: float) -> tuple[int, int]:
        """What the times so far speak for.

        The better they are known the more they let a smaller size win. The fastest is that which
        is so with its error added, so that one lucky look does not decide.

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
        """Times of sizes, and tempos of turns."""
        sizes = sorted({size for turn in self._turns for size in turn})
        found = dict.fromkeys(sizes, 1.0)
        tempos: list[float] = []
        for _ in range(_ROUNDS):
            tempos = [fmean(turn[size] / found[size] for size in turn) for turn in self._turns]
            for size in sizes:
                found[size] = fmean(
                    turn[size] / tempo
                    for turn, tempo in zip(self._turns, tempos, strict=True)
                    if size in turn
                )
        return found, tempos
