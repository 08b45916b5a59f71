"""The gradient noise scale, from what the micro-batches of a window show for free.

Micro-batches of one window are samples of the same gradient. How much they differ tells how noisy
one row's gradient is, and so how many rows are worth averaging.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

from virtualbatch.noise.advice import Advice, advice
from virtualbatch.noise.times import TimedPlan, times_of
from virtualbatch.result import Result
from virtualbatch.window.options import is_real

# With fewer windows, their spread gives no interval.
_FEWEST = 3
# The most windows whose numbers wait on a device until an estimate is asked for.
_MOST_WAITING = 64


class WindowStats(NamedTuple):
    """What the gradients of one window show; engines return it for `stats=True`.

    Fields:
        rows: the rows of the window, R.
        microbatches: the micro-batches whose weight is not 0, k.
        mean_square: the sum over micro-batches of share times squared norm of the mean gradient
            of the micro-batch, `sum s_i |g_i|^2`: a scalar.
        square: the squared norm of the gradient of the window, `|g|^2`: a scalar.
    """

    rows: Any
    microbatches: Any
    mean_square: Any
    square: Any


@dataclass(frozen=True)
class NoiseEstimate(Result):
    """An estimate of the gradient noise scale.

    Args:
        scale: the noise scale `tr(S) / |G|^2`, in rows. In a batch of so many rows, noise and
            signal are equal. Infinite if no signal was seen.
        low: the lower end of its confidence interval, in rows.
        high: the upper end, in rows. Infinite if the windows do not bound it.
        confidence: the confidence of the interval, between 0 and 1.
        noise: tr(S), the summed variance of the gradient of one row.
        signal: `|G|^2`, the squared norm of the true gradient.
        windows: the windows that were counted.
    """

    scale: float
    low: float
    high: float
    confidence: float
    noise: float
    signal: float
    windows: int

    def __str__(self) -> str:
        return (
            f"noise scale {_rows(self.scale)} rows ({self.confidence:.0%} between "
            f"{_rows(self.low)} and {_rows(self.high)}, {self.windows} windows)"
        )


class NoiseScale:
    """Estimates the gradient noise scale of a training run, window by window.

    It is for loops of your own: pass it the `WindowStats` that an engine returns with
    `stats=True`. For `fit` of Keras use the callback `virtualbatch.keras.NoiseScaleCallback`.

    Noise and signal are averaged over windows separately and then divided, because a mean of
    ratios is far off. Micro-batches must be random samples of the data. Rows that are sorted by
    length are not.

    Args:
        decay: how much weight the averages keep with each window. 0.99 looks back about 100
            windows, and 1.0 counts all windows alike.

    Raises:
        ValueError: `decay` is not above 0 and at most 1.

    Source:
        McCandlish, Kaplan, Amodei: An Empirical Model of Large-Batch Training (2018), appendix A.
        For micro-batches of unequal weight see docs/guides/noise_scale.md.

    Example:
        >>> found = NoiseScale(decay=1.0)
        >>> for mean_square in (3.0, 3.2, 2.8, 3.0):
        ...     found.update(WindowStats(64, 4, mean_square, 1.0))
        >>> print(found.estimate())
        noise scale 128 rows (95% between 102 and 165, 4 windows)
    """

    def __init__(self, decay: float = 0.99):
        if not (is_real(decay) and 0 < decay <= 1):
            raise ValueError(
                f"decay must be above 0 and at most 1. Got decay={decay!r}. "
                "Pass 0.99 to look back about 100 windows."
            )
        self._decay = float(decay)
        self._waiting: list[Any] = []
        # Decayed sums: weight, weight squared, and first and second moments of noise and signal.
        self._weight = self._weight_squared = 0.0
        self._means = (0.0, 0.0)
        self._squares = (0.0, 0.0, 0.0)
        self._windows = 0
        self._rows: float | None = None
        self._microbatches = 1.0

    def update(self, stats: Any) -> None:
        """Counts a window.

        The numbers stay on their device until you ask for the estimate, or until many windows
        wait. A window of one micro-batch, or with a gradient that is not finite, is left out.

        Args:
            stats: the `WindowStats` of an engine.

        Raises:
            TypeError: `stats` is something else.
        """
        if not (isinstance(stats, tuple) and len(stats) == len(WindowStats._fields)):
            raise TypeError(
                "update takes the WindowStats of a window. "
                f"Got {stats!r}. Pass the last of what an engine returns with stats=True."
            )
        self._waiting.append(stats)
        if len(self._waiting) >= _MOST_WAITING:
            self._read()

    @property
    def windows(self) -> int:
        """The windows that were counted."""
        self._read()
        return self._windows

    def estimate(self, confidence: float = 0.95) -> NoiseEstimate:
        """The estimate so far.

        Args:
            confidence: the confidence of the interval, between 0 and 1. The interval is that of
                Fieller for a ratio of two means. It assumes that windows are independent and that
                the scale is constant, so it is too narrow where the scale drifts.

        Returns:
            The estimate, with its interval.

        Raises:
            ValueError: no window was counted, or `confidence` is not between 0 and 1.
        """
        if not (is_real(confidence) and 0 < confidence < 1):
            raise ValueError(
                f"confidence must be between 0 and 1. Got confidence={confidence!r}. Pass 0.95."
            )
        self._read()
        if not self._windows:
            raise ValueError(
                "A noise scale needs windows of two micro-batches or more. Got none so far. "
                "Call update with the stats of each window."
            )
        noise, signal = (total / self._weight for total in self._means)
        scale = noise / signal if signal > 0 else math.inf
        low, high = self._interval(noise, signal, confidence)
        # A variance is not negative, though its unbiased estimate may be.
        return NoiseEstimate(max(scale, 0.0), low, high, confidence, noise, signal, self._windows)

    def advice(
        self,
        *,
        plan: TimedPlan | None = None,
        seconds_per_row: float | None = None,
        seconds_per_update: float | None = None,
        rows: int | None = None,
        confidence: float = 0.95,
    ) -> Advice:
        """What the estimate says about the batch size. Nothing is changed.

        Args:
            plan: the `Plan` of this batch, from which times are taken that you do not pass. It must
                have timed two sizes. It does not know the optimizer, so an update costs more than
                it says.
            seconds_per_row: the time of forward and backward for one row of data, once the device
                is busy.
            seconds_per_update: the time of an update beside its rows: the optimizer, and the
                communication between replicas.
            rows: the rows of data in the present batch. None means those of the last window.
            confidence: the confidence of the interval.

        Returns:
            The advice, with the batch size that takes the least time.

        Raises:
            ValueError: a time is not positive and finite, or is missing without a plan.
            ValueError: `rows` is not positive, the plan is of another batch, or no window was
                counted.
        """
        found = self.estimate(confidence)
        if rows is not None and not is_real(rows):
            raise ValueError(
                f"rows must be a positive number. Got rows={rows!r}. "
                "Leave it out for those of the last window."
            )
        present = self._rows if rows is None else rows
        if plan is not None:
            times = times_of(plan, float(present or 0))
            seconds_per_row = seconds_per_row or times.seconds_per_row
            seconds_per_update = seconds_per_update or times.seconds_per_update
        if seconds_per_row is None or seconds_per_update is None:
            raise ValueError(
                "Advice needs to know what a row and an update cost. Got neither a plan nor both "
                "times. Pass plan=, or measure them: see docs/guides/noise_scale.md."
            )
        return advice(
            found.scale,
            (found.low, found.high),
            rows=float(present or 0),
            microbatch_size=(self._rows or 1.0) / self._microbatches,
            seconds_per_row=seconds_per_row,
            seconds_per_update=seconds_per_update,
        )

    def __str__(self) -> str:
        return str(self.estimate()) if self.windows else "noise scale: no window counted yet"

    def __repr__(self) -> str:
        # Do not read the windows: their numbers may be on a device, or traced.
        return f"{type(self).__name__}(decay={self._decay})"

    def _read(self) -> None:
        waiting, self._waiting = self._waiting, []
        for stats in waiting:
            self._count(*map(_number, WindowStats._fields, stats))

    def _count(self, rows: float, microbatches: float, mean_square: float, square: float) -> None:
        if microbatches < 2 or not (math.isfinite(mean_square) and math.isfinite(square)):
            return
        if rows <= 0:
            raise ValueError(
                "A window must have rows, and micro-batches. "
                f"Got WindowStats of {rows:g} rows. Pass what an engine returns with stats=True."
            )
        # E sum s_i |g_i|^2 = |G|^2 + k tr(S) / R, and E |g|^2 = |G|^2 + tr(S) / R, for any shares
        # in proportion to what the means were divided by.
        noise = rows * (mean_square - square) / (microbatches - 1)
        signal = square - noise / rows
        keep = self._decay
        self._weight = keep * self._weight + 1
        self._weight_squared = keep**2 * self._weight_squared + 1
        a, b = self._means
        self._means = keep * a + noise, keep * b + signal
        c, d, e = self._squares
        self._squares = (
            keep * c + noise * noise,
            keep * d + noise * signal,
            keep * e + signal * signal,
        )
        self._windows += 1
        self._rows, self._microbatches = rows, microbatches

    def _interval(self, noise: float, signal: float, confidence: float) -> tuple[float, float]:
        """Fieller's interval of noise / signal."""
        counted = self._weight**2 / self._weight_squared
        if self._windows < _FEWEST or counted <= 1:
            return 0.0, math.inf
        z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 / (counted - 1)
        c, d, e = (total / self._weight for total in self._squares)
        vxx, vxy, vyy = c - noise**2, d - noise * signal, e - signal**2
        # (noise - r signal)^2 <= z^2 var(noise - r signal), solved for r.
        a = signal**2 - z2 * vyy
        b = noise * signal - z2 * vxy
        found = b**2 - a * (noise**2 - z2 * vxx)
        if found < 0:
            return 0.0, math.inf
        ends = sorted((b + sign * math.sqrt(found)) / a for sign in (-1, 1)) if a else [0.0, 0.0]
        if a > 0:
            return max(ends[0], 0.0), max(ends[1], 0.0)
        # The signal may be zero, so the ratio has no upper end.
        return (ends[1] if ends[0] <= 0 < ends[1] and noise > 0 else 0.0), math.inf


def _number(name: str, value: Any) -> float:
    """An entry of the statistics as a Python number, copied from its device."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            "WindowStats must hold four numbers. "
            f"Got {name}={value!r}. Pass what an engine returns with stats=True."
        ) from error


def _rows(number: float) -> str:
    return "infinitely many" if math.isinf(number) else f"{number:.3g}"
