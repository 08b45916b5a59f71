"""How an accumulated gradient was put together, where the loss and its weights are right.

Every micro-batch's gradient is known, and so is what their sum should be: the mistake is the one
whose arithmetic gives the sum that was observed.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from virtualbatch.certify.certificate import Finding
from virtualbatch.certify.weights import Sketch

_WHERE = "the accumulation"


def miscombined(
    sketch: Sketch,
    accumulated: np.ndarray,
    parts: np.ndarray,
    norms: np.ndarray,
    shares: Sequence[float],
    errors: Mapping[str, float],
    tolerance: float,
) -> Finding | None:
    """Names the mistake of a sum of gradients.

    Args:
        sketch: what compares.
        accumulated: what came out, as the sketch has it.
        parts: the same of each micro-batch alone; shape (micro-batches, coordinates).
        norms: norm of each micro-batch's gradient, all of it.
        shares: what each should be multiplied by.
        errors: parameter name -> its error.
        tolerance: of an error.

    Returns:
        The finding, or None if no mistake that is known gives this sum.
    """
    wrong = [name for name, error in errors.items() if error > tolerance]
    if wrong and len(wrong) < len(errors):
        return Finding(
            "no_gradient",
            ", ".join(wrong),
            "A part of the gradient of these parameters is lost; all others are right.",
            "Look for a parameter that is used twice or sparsely, and add all its gradients.",
        )
    count = len(parts)
    due = np.dot(shares, parts)
    if sketch.fits(parts.sum(0) / count, accumulated):
        return Finding(
            "weight",
            _WHERE,
            f"The {count} means are averaged as if they weighed alike: a mean of means.",
            "Multiply each by its share of the window's weight.",
        )
    for missing in (count - 1, 0):
        left = [index for index in range(count) if index != missing]
        some = np.asarray(shares)[left]
        # The rest may have been divided by what is left, or by the whole.
        if any(
            sketch.fits(factor * np.dot(some, parts[left]), accumulated)
            for factor in (1.0, 1 / max(some.sum(), 1e-300))
        ):
            return Finding(
                "last_window",
                _WHERE,
                f"Micro-batch {missing} of {count} is dropped.",
                "Add all of them, also where the last ones are fewer.",
            )
    factor = float(np.dot(accumulated, due) / max(np.dot(due, due), 1e-300))
    if sketch.fits(factor * due, accumulated):
        return Finding(
            "sum_loss",
            _WHERE,
            f"The gradient is {factor:.4g} times what it should be, {count} micro-batches.",
            "Divide by the window's weight, once.",
        )
    factors, *_ = np.linalg.lstsq((parts * np.asarray(shares)[:, None]).T, accumulated, rcond=None)
    if parts.shape[1] > 2 * count and sketch.fits(factors @ (parts * np.c_[shares]), accumulated):
        cut = factors < 1 - 1e-6
        kept = (factors * norms)[cut]
        if len(kept) > 1 and np.ptp(kept) < 1e-3 * kept.max():
            return Finding(
                "clipping",
                _WHERE,
                "Gradients of single micro-batches are clipped to one norm before they are added.",
                "Clip once, after the window.",
            )
        return Finding(
            "weight",
            _WHERE,
            "Micro-batches are weighted by other shares than theirs.",
            "Multiply each by its share of the window's weight.",
        )
    return None


def stale(where: str) -> Finding:
    """The finding that a window starts from what the last one left."""
    return Finding(
        "stale_buffer",
        where,
        "The same window gives another gradient the second time: it starts from what the first "
        "one left.",
        "Start every window from an empty buffer.",
    )
