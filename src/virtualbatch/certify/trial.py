"""What an engine does to try the law on a few rows, and which rows these are."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.proven import Seen
from virtualbatch.certify.weights import candidates

# Rows that the parts are chosen of, and ways to choose them.
_POOL, _WAYS = 16, 64
# A difference of counts, as a logarithm, that no rounding hides.
_CLEAR = 0.1


class Distance(NamedTuple):
    """How far two parts are from the whole of them.

    Fields:
        off: largest difference in any gradient, in the largest gradient times epsilon of the
            narrowest dtype; NaN where something is not finite.
        is_same: whether both parts and the whole have one loss and one gradient.
        constant: the values of terms of the loss that have no gradient at all.
    """

    off: float
    is_same: bool
    constant: Mapping[Any, float]

    @classmethod
    def of(
        cls,
        sizes: Sequence[float],
        shares: Sequence[float],
        losses: Sequence[Mapping[Any, float]],
        constant: Mapping[Any, float],
        epsilon: float,
    ) -> "Distance":
        """The distance from what was measured.

        Args:
            sizes: the largest number of the first part's share; of it without the whole, which is
                the other part's share where the law holds; and of what is left without that.
            shares: what each part is of the whole.
            losses: of the first part, the whole and the other part, by term.
            constant: see above.
            epsilon: of the narrowest dtype.
        """
        first, second, left = sizes
        largest = max(sizes) if math.isfinite(first + second + left) else math.nan
        off = left / (largest * epsilon) if largest else 0.0
        alike = abs(first * shares[1] - second * shares[0]) <= 1e-3 * first * shares[1]
        is_same = bool(first) and alike and losses[0] == losses[1] == losses[2]
        return cls(off, is_same, constant)


class UntriedError(Exception):
    """Says why a loss cannot be tried."""


class Trial(ABC):
    """A loss and some rows of the user's; every method leaves the training as it was.

    Attributes:
        rows: how many there are to choose from.
        sizes: rows of the micro-batches of the window.
        empty: the rows of a micro-batch without weight.
        pairs: rows of the two parts of each pair. One and one tell a sum, unequal ones a wrong
            weight, and only about four and four show what sorts or compares rows.
        seen: what was seen so far.
    """

    rows: int
    sizes: Sequence[int]
    empty: range = range(0)
    pairs: Sequence[tuple[int, int]] = ((1, 1), (1, 2), (4, 4))
    seen = Seen()

    @abstractmethod
    def leaves(self, rows: Sequence[int]) -> Mapping[str, np.ndarray]:
        """The arrays of some rows of the batch, by the expressions that reach them."""

    @abstractmethod
    def distance(self, a: Sequence[int], b: Sequence[int]) -> Distance | None:
        """How far the shares of two parts are from the gradient of both.

        Args:
            a: row numbers of the first part.
            b: of the second.

        Returns:
            The distance; None where the loss draws random numbers, which only `certificate` can
            keep by row.

        Raises:
            UntriedError: it draws random numbers that nobody can keep by row.
        """

    @abstractmethod
    def certificate(self, rows: Sequence[int], size: int) -> Certificate:
        """The certificate of some rows, cut into micro-batches of a size."""


def parts(trial: Trial) -> list[tuple[list[int], list[int]]]:
    """The pairs of parts that are tried, as row numbers.

    A wrong weight shows only where it differs. So of many ways to part some rows of the batch that
    one is taken in which the parts differ most by whatever the batch's own arrays count.
    """
    some = min(trial.rows, max(a + b for a, b in trial.pairs))
    pool = _spread(trial.rows, max(some, min(trial.rows, _POOL)))
    counts = [found.per_row for found in candidates(trial.leaves(pool), len(pool))]
    empty = [*trial.empty][: some // 2]
    most = len(empty) or some // 2
    sizes = {(min(a, most), min(b, some - some // 2)): None for a, b in trial.pairs}
    random = np.random.default_rng(0)
    found = []
    for a, b in sizes:
        if not (a and b):
            continue
        b = min(b, a + 1)
        ways = [_spread(len(pool), a + b)]
        ways += [
            random.permutation(len(pool))[: a + b].tolist() for _ in range(_WAYS if counts else 0)
        ]
        best = max(ways, key=lambda way: _contrast(counts, way[:a], way[a:]))
        first, second = ([pool[k] for k in part] for part in (best[:a], best[a:]))
        if empty:
            first, second = (
                empty[:a],
                [row for row in [*first, *second] if row not in trial.empty][:b],
            )
        found.append((first, second))
    return found


def _spread(rows: int, some: int) -> list[int]:
    """Some row numbers, evenly spaced."""
    return [round(k * (rows - 1) / max(1, some - 1)) for k in range(some)]


def _contrast(counts: Sequence[np.ndarray], a: Sequence[int], b: Sequence[int]) -> float:
    """By how many of some counts two parts differ; a part that counts nothing has no mean."""
    total = 0.0
    for count in counts:
        first, second = float(count[a].mean()), float(count[b].mean())
        counted = first > 0 and second > 0
        total += min(abs(math.log(first / second)), _CLEAR) if counted else -_CLEAR
    return total
