"""Finds the weights that turn the means of micro-batches into the mean of the batch.

Each hypothesis is arithmetic on the gradients of parts. The right one reproduces the gradient of
the whole batch up to rounding; the others are far off.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from virtualbatch.certify.certificate import Finding
from virtualbatch.certify.coordinates import Coordinates
from virtualbatch.certify.counts import Weight, candidates
from virtualbatch.certify.errors import Scales
from virtualbatch.certify.step import TrainingStep
from virtualbatch.window.shares import shares

# Gradients of this many numbers cannot be fitted by chance.
_ENOUGH = 8
# Fixes for engines that divide by themselves.
_ELEMENTS = (
    "Return what is averaged, one value per row or token, and let the framework divide. Then the "
    "engine finds the weights."
)
_ONE_PER_ROW = (
    "Return one value per row, or add one value per row by add_loss, and let the framework reduce "
    "them; or divide by what it counts, such as the rows."
)


class Explanation(NamedTuple):
    """The result for one term.

    Fields:
        right: whether the given weights are right for it.
        finding: what is wrong; None if no weights explain it.
    """

    right: bool
    finding: Finding | None


def explained(
    subject: TrainingStep, term: Any, where: str, scales: Scales, tolerance: float
) -> Explanation:
    """Looks for the weights of a term.

    Args:
        subject: the training step.
        term: name of the term.
        where: its place, in words.
        scales: units of gradients and losses.
        tolerance: the tolerance of the certificate.
    """
    coordinates = Coordinates(subject.parameters, scales, tolerance)

    def value(rows: np.ndarray) -> np.ndarray:
        return coordinates.of(subject.alone(rows, term), term)

    pieces = subject.pieces
    whole = coordinates.zoomed(value(np.arange(subject.rows)))
    if subject.weighs_itself:
        found = coordinates.of(subject.accumulated_term(term), term)
        if coordinates.fits(found, whole):
            return Explanation(True, None)
    parts = np.stack([value(piece) for piece in pieces])
    rows = shares([float(len(piece)) for piece in pieces])
    weights = subject.weights()(term)
    given_parts = np.asarray(given_shares(subject, term))
    empty = given_parts == 0
    if coordinates.fits(_weighted(given_parts, parts), whole):
        return Explanation(True, None)
    if np.any(parts[empty]) and np.all(np.isfinite(parts[empty])):
        return Explanation(
            False,
            Finding(
                "weight",
                where,
                "A micro-batch of weight 0 is left out, but its loss is not 0: its divisor has a "
                "floor, such as max(1, count).",
                'Pass weight="sum", and divide by the count of the whole batch, with its floor: '
                "count before the call, and put the number into the batch.",
            ),
        )
    given = "what weight returned"
    if weights is None or isinstance(weights, str):
        given = "rows" if weights is None else "nothing, as a sum"
    if weights is not None and coordinates.fits(_weighted(rows, parts), whole):
        return _wrong_weight(subject, where, given, Weight("rows", "", np.ones(subject.rows)))
    if coordinates.fits(parts.sum(0), whole):
        return Explanation(
            False,
            Finding(
                "sum_loss",
                where,
                "The loss is a sum over rows, not a mean: micro-batches add up instead of "
                "averaging.",
                _ONE_PER_ROW
                if subject.weighs_itself
                else 'Pass weight="sum", or divide it by what it counts, such as the rows.',
            ),
        )
    for candidate in candidates(subject.leaves, subject.rows):
        counted = [float(candidate.per_row[piece].sum()) for piece in pieces]
        if coordinates.fits(_weighted(shares(counted), parts), whole):
            return _wrong_weight(subject, where, given, candidate)
    return _of_other_parts(subject, where, value, coordinates, whole)


def _weighted(shares: Any, parts: np.ndarray) -> np.ndarray:
    """The sum of parts times their shares; parts with share 0 are left out and may be NaN."""
    counted = np.asarray(shares) != 0
    found: np.ndarray = np.dot(np.asarray(shares)[counted], parts[counted])
    return found


def given_shares(subject: TrainingStep, term: Any) -> list[float]:
    """The shares of the pieces by the user's weights."""
    weights = subject.weights()(term)
    if isinstance(weights, str):
        return [1.0] * len(subject.pieces)
    return shares([float(len(piece)) for piece in subject.pieces] if weights is None else weights)


def _wrong_weight(subject: TrainingStep, where: str, given: str, right: Weight) -> Explanation:
    if subject.narrow and right.code:
        return Explanation(
            False,
            Finding(
                "low_precision",
                ", ".join(subject.narrow),
                f"The loss divides by {right.text}, counted in half precision, where large "
                "counts are rounded.",
                f"Count in float32: weight=lambda {subject.weight_takes}: {right.code}.",
            ),
        )
    fix = (
        f"Pass weight=lambda {subject.weight_takes}: {right.code}."
        if right.code
        else "Leave weight out."
    )
    fix = _ELEMENTS if subject.weighs_itself else fix
    why = (
        f"The mean of each micro-batch is weighted by {given}, but the loss divides by "
        f"{right.text}: a mean of means."
    )
    if right.likewise is not None:
        why += f" In these rows {right.likewise} counts alike; take what your loss divides by."
    return Explanation(False, Finding("weight", where, why, fix))


def _of_other_parts(
    subject: TrainingStep, where: str, value: Any, coordinates: Coordinates, whole: np.ndarray
) -> Explanation:
    """Tries hypotheses that need other cuts than the user's."""
    every = np.arange(subject.rows)
    halves = [value(half) for half in np.array_split(every, 2)]
    if subject.rows >= 3:
        thirds = [value(third) for third in np.array_split(every, 3)]
        once, twice = sum(halves) - whole, (sum(thirds) - whole) / 2
        # A regulariser is counted once per part, whatever the number of parts.
        if coordinates.fits(once, twice) and not coordinates.fits(once, np.zeros_like(once)):
            return Explanation(
                False,
                Finding(
                    "regulariser",
                    where,
                    "A part of the loss does not depend on the rows. The rest is a sum over rows, "
                    "so this part is counted once per micro-batch.",
                    "Divide the rest by what it counts, and leave this part to add_loss."
                    if subject.weighs_itself
                    else 'Return a dict of terms, and as their weights "sum" for the rest and None '
                    "for the regulariser.",
                ),
            )
    away = halves[0] - halves[1]
    part = float(np.dot(whole - halves[1], away) / np.dot(away, away)) if np.any(away) else 0.5
    guess = halves[1] + part * away
    if coordinates.known >= _ENOUGH and 0 <= part <= 1 and coordinates.fits(guess, whole):
        return Explanation(
            False,
            Finding(
                "weight",
                where,
                "The loss is a mean of something that the given weights do not count: the first "
                f"half of the batch carries {part:.1%} of it.",
                _ELEMENTS
                if subject.weighs_itself
                else "Pass weight=..., what your mean was divided by.",
            ),
        )
    if subject.rows >= 4:
        # The quarters have equal size, so that few shapes are compiled.
        quarters = np.split(every[: subject.rows // 4 * 4], 4)
        pair = _two_means(subject, value, coordinates, quarters)
        if pair is not None:
            return Explanation(
                False,
                Finding(
                    "weight",
                    where,
                    f"The loss is a sum of two means, one over {pair[0].text} and one over "
                    f"{pair[1].text}; no single weight is right for both.",
                    _ELEMENTS
                    if subject.weighs_itself
                    else "Return a dict of two terms, and from weight a dict with the same names.",
                ),
            )
    return Explanation(False, None)


def _two_means(
    subject: TrainingStep, value: Any, coordinates: Coordinates, quarters: Sequence[np.ndarray]
) -> tuple[Weight, Weight] | None:
    """The weights of two means that add up to the loss; None if there are no such weights.

    Each union of quarters gives one equation: its loss is a sum over a count, plus another sum over
    another count. Fifteen unions overdetermine the eight sums.
    """
    unions = [
        chosen for count in range(1, 5) for chosen in combinations(range(len(quarters)), count)
    ]
    values = np.stack([value(np.concatenate([quarters[q] for q in union])) for union in unions])
    rows = Weight("rows", "", np.ones(subject.rows))
    for first, second in combinations([rows, *candidates(subject.leaves, subject.rows)], 2):
        table = np.zeros((len(unions), 8))
        for index, union in enumerate(unions):
            for k, weight in enumerate((first, second)):
                count = sum(float(weight.per_row[quarters[q]].sum()) for q in union)
                for q in union:
                    table[index, 4 * k + q] = 1 / count if count else 0.0
        if _spans(coordinates, table[:, :4], values) or _spans(coordinates, table[:, 4:], values):
            # One mean is enough to explain these parts.
            return None
        if _spans(coordinates, table, values):
            return first, second
    return None


def _spans(coordinates: Coordinates, table: np.ndarray, values: np.ndarray) -> bool:
    """Whether values are combinations of the columns of a table."""
    solved, *_ = np.linalg.lstsq(table, values, rcond=None)
    return coordinates.fits(table @ solved, values)
