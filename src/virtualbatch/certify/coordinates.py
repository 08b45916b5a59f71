"""Some coordinates of a gradient, on which hypotheses about weights are tried."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from virtualbatch.certify.errors import Scales
from virtualbatch.certify.step import Observed

# The number of coordinates of the gradient on which hypotheses are tried.
_COORDINATES = 4096
# Hypotheses add up several gradients, so they may be off by more roundings than the verdict.
_SLACK = 64
# A small term is compared at its own size, but at no less than this share of the other terms.
_SMALLEST = 1e-2


class Coordinates:
    """Some coordinates of a gradient and the loss, in units of the tolerance.

    Args:
        parameters: parameter name -> its value.
        scales: units of gradients and losses.
        tolerance: the tolerance of the certificate.
    """

    def __init__(self, parameters: Mapping[str, np.ndarray], scales: Scales, tolerance: float):
        self._scales = scales
        self._tolerance = tolerance
        each = max(1, _COORDINATES // max(1, len(parameters)))
        self._places = {
            name: np.linspace(0, value.size - 1, min(each, value.size)).astype(int)
            for name, value in parameters.items()
        }
        self.known = sum(map(len, self._places.values()))

    def of(self, found: Observed, term: Any) -> np.ndarray:
        """The coordinates of a run, with the loss of one term first."""
        loss = found.terms[term] / self._scales.loss
        parts = [np.zeros(len(places)) for places in self._places.values()]
        for part, (name, places) in zip(parts, self._places.items(), strict=True):
            gradient = found.gradients[name]
            if gradient is not None:
                part += gradient.reshape(-1)[places] / self._scales.gradients[name]
        return np.concatenate([[loss], *parts]) / self._tolerance

    def zoomed(self, whole: np.ndarray) -> np.ndarray:
        """Uses the size of a term as the unit from now on; returns the term in that unit."""
        size = float(np.max(np.abs(whole), initial=0.0)) * self._tolerance
        unit = min(1.0, max(size, _SMALLEST))
        self._tolerance *= unit
        return whole / unit

    @staticmethod
    def fits(guess: np.ndarray, truth: np.ndarray) -> bool:
        """Whether a guess equals the observation, up to rounding."""
        return bool(np.max(np.abs(guess - truth), initial=0.0) <= _SLACK)
