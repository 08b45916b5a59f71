"""The interface by which an engine tries a loss on a few rows, and the choice of these rows."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.counts import candidates
from virtualbatch.certify.of_signal import raise_if_of_signal
from virtualbatch.certify.proven import Seen

# Parts are chosen among at most _POOL rows, among fewer (at least _FEWEST) if these hold more than
# _NUMBERS numbers, and in _WAYS random ways.
_POOL, _FEWEST, _NUMBERS, _WAYS = 256, 16, 2**22, 64
# An epsilon above this belongs to half precision.
_HALF = 1e-4
# Rows with weight that are tried, two at a time, with one row without weight.
_FULL = 4
# A difference of counts, as a logarithm; a larger difference shows nothing more.
_CLEAR = 0.7


class Distance(NamedTuple):
    """The difference between the sum of two parts and the whole.

    Fields:
        off: the largest difference in any gradient, divided by the largest gradient times epsilon
            of the narrowest dtype (in half precision an eighth of epsilon). NaN if something is not
            finite, or if every gradient is 0 and shows nothing.
        is_same: whether both parts and the whole have the same loss and the same gradient.
        constant: the values of those terms of the loss that have no gradient at all.
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
            sizes: the largest number in each of three gradients: the share of the first part; the
                whole minus that, which is the share of the other part if gradients add up; and the
                rest after subtracting the other part.
            shares: the share of each part in the whole.
            losses: the losses of the first part, the whole and the other part, by term.
            constant: see the field `constant`.
            epsilon: epsilon of the narrowest dtype.
        """
        first, second, left = sizes
        largest = max(sizes) if math.isfinite(first + second + left) else math.nan
        # Half precision rounds less than its epsilon here, and hides more of a mistake.
        unit = largest * (epsilon / 8 if epsilon > _HALF else epsilon)
        off = left / unit if largest else math.nan
        alike = abs(first * shares[1] - second * shares[0]) <= 1e-3 * first * shares[1]
        is_same = bool(first) and alike and losses[0] == losses[1] == losses[2]
        return cls(off, is_same, constant)


class UntriedError(Exception):
    """The reason why a loss cannot be tried."""


def reason_of(error: Exception, why: Callable[[Exception], str]) -> str:
    """Why a loss could not be tried, in words.

    Args:
        error: raised by the attempt; an error from a signal handler is raised again.
        why: error -> the reason in words.
    """
    raise_if_of_signal(error)
    return str(error) if isinstance(error, UntriedError) else why(error)


class Trial(ABC):
    """A loss and some of the user's rows; no method changes the state of the training.

    Attributes:
        rows: number of rows to choose from.
        sizes: rows of the micro-batches of the window.
        empty: rows of a micro-batch in which some term has no weight.
        full: rows of the micro-batch in which that term has its largest weight.
        width: numbers that one row has in all arrays.
        pairs: numbers of rows of the two parts of each pair. One and one show a sum, unequal
            numbers a wrong weight; about four and four are needed to show that rows are sorted or
            compared.
        seen: the observations so far.
        is_rowwise: whether the loss is made from a function that `rowwise` wraps.
    """

    rows: int
    sizes: Sequence[int]
    empty: range = range(0)
    full: range = range(0)
    width = 1
    pairs: Sequence[tuple[int, int]] = ((1, 1), (1, 2), (4, 4))
    seen = Seen()
    is_rowwise = False

    @abstractmethod
    def leaves(self, rows: Sequence[int]) -> Mapping[str, np.ndarray]:
        """The arrays of some rows of the batch, by the expressions that reach them."""

    @abstractmethod
    def distance(self, a: Sequence[int], b: Sequence[int]) -> Distance | None:
        """The difference between the summed shares of two parts and the gradient of both.

        Args:
            a: row numbers of the first part.
            b: row numbers of the second part.

        Returns:
            The distance; None if the loss draws random numbers, which only `certificate` can keep
            by row.

        Raises:
            UntriedError: the loss draws random numbers that cannot be kept by row.
        """

    @abstractmethod
    def certificate(self, rows: Sequence[int], size: int) -> Certificate:
        """The certificate of some rows, cut into micro-batches of a size."""


def parts(trial: Trial) -> list[tuple[list[int], list[int]]]:
    """The pairs of parts that are tried, as row numbers.

    A wrong weight shows only if the parts differ in it. So many ways to choose the parts are
    compared. The best way has the largest differences in all that the batch's arrays can count. A
    divisor with a floor shows only if a part counts nothing, so this needs another pair.
    """
    some = min(trial.rows, max(a + b for a, b in trial.pairs))
    most = min(_POOL, max(_FEWEST, _NUMBERS // max(1, trial.width)))
    pool = _spread(trial.rows, min(trial.rows, most))
    counts = [found.per_row for found in candidates(trial.leaves(pool), len(pool))]
    sizes = dict.fromkeys(_fitting(a, b, some) for a, b in trial.pairs)
    shown = np.zeros(len(counts))
    found = []
    # The largest pair first, because it has the most ways; the others add what it does not show.
    for a, b in sorted(sizes, key=sum, reverse=True):
        if a and b:
            ways = _ways(counts, len(pool), a, b)
            contrasts = [_contrasts(counts, way[:a], way[a:]) for way in ways]
            gains = [float(np.where(c < 0, c, np.maximum(c - shown, 0)).sum()) for c in contrasts]
            best = int(np.argmax(gains))
            shown = np.maximum(shown, contrasts[best])
            found.append(([pool[k] for k in ways[best][:a]], [pool[k] for k in ways[best][a:]]))
    found.reverse()
    if trial.empty:
        full = [trial.full[k] for k in _spread(len(trial.full), min(len(trial.full), _FULL))]
        found += [([trial.empty.start], full[k : k + 2]) for k in range(0, len(full), 2)]
    return found


def _fitting(a: int, b: int, some: int) -> tuple[int, int]:
    """Sizes of two parts that fit into `some` rows; unequal sizes stay unequal."""
    first, second = min(a, some // 2), min(b, some - some // 2)
    if a == b or first != second or first == 1:
        return first, second
    # Equal parts do not show a weight that is the same for all rows.
    return (first - 1, second) if a < b else (first, second - 1)


def rows_of_part(sizes: Sequence[int], number: int) -> range:
    """The rows of a micro-batch, by its number and the sizes of all."""
    start = sum(sizes[:number])
    return range(start, start + sizes[number])


def _ways(counts: Sequence[np.ndarray], rows: int, a: int, b: int) -> list[list[int]]:
    """Ways to choose two parts: evenly spaced, by the smallest and largest counts, at random."""
    ways = [_spread(rows, a + b)]
    if not counts:
        return ways
    for count in counts:
        order = np.argsort(count, kind="stable").tolist()
        some = [row for row in order if count[row] > 0]
        none = [row for row in order if count[row] <= 0]
        if len(some) < 2:
            continue
        for most in (b, 1):
            # Set the row that counts least against rows that count most. Prefer rows that count
            # nothing for the rest.
            second = some[1:][-most:]
            others = [*none, *(row for row in some[1:] if row not in second)]
            way = [some[0], *others[: a - 1], *second, *others[a - 1 :]][: a + b]
            if len(way) == a + b:
                ways.append(way)
    random = np.random.default_rng(0)
    return ways + [random.permutation(rows)[: a + b].tolist() for _ in range(_WAYS)]


def _spread(rows: int, some: int) -> list[int]:
    """Some row numbers, evenly spaced."""
    return [round(k * (rows - 1) / max(1, some - 1)) for k in range(some)]


def _contrasts(counts: Sequence[np.ndarray], a: Sequence[int], b: Sequence[int]) -> np.ndarray:
    """How much two parts differ in each count; below 0 if one of them counts nothing."""
    found = []
    for count in counts:
        first, second = float(count[a].mean()), float(count[b].mean())
        empty = (first <= 0) + (second <= 0)
        found.append(-_CLEAR * empty if empty else min(abs(math.log(first / second)), _CLEAR))
    return np.array(found)
