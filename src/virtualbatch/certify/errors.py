"""Differences between two runs, scaled so that one tolerance fits every parameter."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virtualbatch.certify.step import Observed

# Measured rounding is multiplied by this, because two runs may round alike by chance.
_ROUNDING = 16
# A gradient that should be 0 holds the rounding of far larger numbers, so every scale is at least
# this share of the largest gradient.
_ZERO = 0.01


class Scales(NamedTuple):
    """The units of differences, chosen so that one tolerance fits all of them.

    Fields:
        gradients: parameter name -> its largest gradient plus its measured rounding.
        loss: the size of the loss plus its measured rounding.
    """

    gradients: dict[str, float]
    loss: float


def measured_scales(whole: Observed, alike: Sequence[Observed], tolerance: float) -> Scales:
    """Scales from runs that differ by rounding alone.

    Args:
        whole: the run on the whole batch.
        alike: more runs on the whole batch, with the rows in other orders.
        tolerance: the largest error that counts as rounding.
    """
    overall = largest_gradient(whole)
    gradients = {}
    for name, gradient in whole.gradients.items():
        moved = [_largest(_minus(gradient, other.gradients[name])) for other in alike]
        rounding = _ROUNDING * max(moved, default=0.0) / tolerance
        gradients[name] = _largest(gradient) + rounding + _ZERO * overall or 1.0
    moved = [abs(total_loss(whole) - total_loss(other)) for other in alike]
    rounding = _ROUNDING * max(moved, default=0.0) / tolerance
    size = max((abs(term) for term in whole.terms.values()), default=0.0)
    return Scales(gradients, size + rounding or 1.0)


def gradient_errors(whole: Observed, other: Observed, scales: Scales) -> dict[str, float]:
    """Parameter name -> largest difference of its two gradients, divided by its scale."""
    return {
        name: _largest(_minus(gradient, other.gradients[name])) / scales.gradients[name]
        for name, gradient in whole.gradients.items()
    }


def state_errors(whole: Observed, other: Observed) -> dict[str, float]:
    """Name -> relative difference of the state of layers, such as running means."""
    return {
        name: _largest(value - other.state[name]) / (_largest(value) or 1.0)
        for name, value in whole.state.items()
        if name in other.state
    }


def differ(a: Observed, b: Observed, relative: float) -> bool:
    """Whether two runs differ by more than a share of the largest gradient or of the loss."""
    overall = largest_gradient(a)
    loss = total_loss(a)
    return abs(loss - total_loss(b)) > relative * max(abs(loss), 1e-30) or any(
        _largest(_minus(gradient, b.gradients[name])) > relative * overall
        for name, gradient in a.gradients.items()
    )


def all_finite(found: Observed) -> bool:
    """Whether the loss and all gradients are finite."""
    return bool(np.all(np.isfinite(list(found.terms.values())))) and all(
        g is None or bool(np.all(np.isfinite(g))) for g in found.gradients.values()
    )


def total_loss(found: Observed) -> float:
    """The sum of all terms."""
    return sum(found.terms.values())


def largest_gradient(found: Observed) -> float:
    """The largest number in any gradient."""
    return max((_largest(g) for g in found.gradients.values()), default=0.0)


def _minus(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    if a is None:
        return b
    return a if b is None else a - b


def _largest(a: np.ndarray | None) -> float:
    return 0.0 if a is None else float(np.max(np.abs(a), initial=0.0))
