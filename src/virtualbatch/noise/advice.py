"""Finds the batch size that takes the least time, from the noise scale and two measured times."""

import math
from dataclasses import dataclass

from virtualbatch.result import Result
from virtualbatch.window.options import is_real

# Times that differ by less than this factor count as equal.
_ALIKE = 1.1
_NO_SIGNAL = "No signal was seen in the gradients yet, so nothing can be said: count more windows."
_WITHOUT_END = "A larger batch pays, however large it is."


@dataclass(frozen=True)
class ScalingRule:
    """How settings may change when the batch grows by a factor.

    Args:
        optimizer: the optimizer that the rule is for.
        learning_rate: the factor for the learning rate.
        betas: exponents (a, b): replace beta1 by beta1**a and beta2 by beta2**b. None for an
            optimizer without betas.
        source: where the rule comes from.
    """

    optimizer: str
    learning_rate: float
    betas: tuple[float, float] | None
    source: str

    def __str__(self) -> str:
        text = f"{self.optimizer}: learning rate x {self.learning_rate:.3g}"
        if self.betas:
            text += "".join(
                f", beta{k} ** {power:.3g}"
                for k, power in enumerate(self.betas, start=1)
                if power != 1
            )
        return f"{text} ({self.source})"


@dataclass(frozen=True)
class Advice(Result):
    """What a noise scale and two times say about a batch size.

    All rows here are rows of data.

    Args:
        rows: the rows of the present batch.
        noise_scale: the noise scale, in rows.
        best_rows: the rows of the batch with the least expected time.
        best_low: the same at the lower end of the interval of the noise scale.
        best_high: the same at the upper end. Infinite if that is.
        time: the expected time to reach the same loss, relative to that of `best_rows`.
        extra_rows: the rows that the present batch needs in all, relative to the smallest batch,
            minus 1: 0.5 is half as many again.
        extra_updates: the updates that it needs, relative to an infinite batch, minus 1.
        verdict: what to do, in one sentence.
        verdict_low: the same at the lower end of the interval of the noise scale.
        verdict_high: the same at the upper end.
        break_even: the seconds per update, beside its rows, for which the present batch would be
            the best.
        seconds_per_row: the time per row that was used.
        seconds_per_update: the time per update, beside its rows, that was used.
        rules: how to change settings if the batch becomes `best_rows`.
    """

    rows: float
    noise_scale: float
    best_rows: float
    best_low: float
    best_high: float
    time: float
    extra_rows: float
    extra_updates: float
    verdict: str
    verdict_low: str
    verdict_high: str
    break_even: float
    seconds_per_row: float
    seconds_per_update: float
    rules: tuple[ScalingRule, ...]

    def __str__(self) -> str:
        lines = [
            self.verdict,
            f"Noise scale {_number(self.noise_scale)} rows; best batch {_number(self.best_rows)} "
            f"rows ({_number(self.best_low)} to {_number(self.best_high)}).",
            f"A batch of {_number(self.rows)} takes {_number(100 * self.extra_rows)} % more rows "
            f"than the smallest would and {_number(100 * self.extra_updates)} % more updates than "
            f"the largest, and {_number(self.time)} times the time of the best.",
        ]
        lines += [f"Were the noise scale {words}: {verdict}" for words, verdict in self._band()]
        if self.noise_scale and math.isfinite(self.noise_scale):
            lines.append(
                f"The batch of {_number(self.rows)} would be best if an update cost "
                f"{self.break_even:.3g} s beside its rows; {self.seconds_per_update:.3g} s is "
                f"taken, and {self.seconds_per_row:.3g} s for a row."
            )
        if self.rules:
            lines.append(f"Should the batch become {_number(self.best_rows)} rows:")
            lines += [f"  {rule}" for rule in self.rules]
        return "\n".join(lines)

    def _band(self) -> list[tuple[str, str]]:
        ends = (("at its lowest", self.verdict_low), ("at its highest", self.verdict_high))
        return [(words, verdict) for words, verdict in ends if verdict != self.verdict]


def advice(
    noise_scale: float,
    interval: tuple[float, float],
    *,
    rows: float,
    microbatch_size: float,
    seconds_per_row: float,
    seconds_per_update: float,
) -> Advice:
    """What a noise scale says about a batch size.

    To reach a loss with batches of B rows takes updates in proportion to 1 + C / B, where C, the
    critical batch, is taken to be the noise scale. An update takes B t + u seconds, so the time is
    least at B = sqrt(C u / t).

    Args:
        noise_scale: the noise scale in rows; infinite if no signal was seen.
        interval: its confidence interval.
        rows: rows of the present batch.
        microbatch_size: rows of one micro-batch.
        seconds_per_row: t.
        seconds_per_update: u.

    Raises:
        ValueError: rows or a time is not a positive finite number.

    Source:
        McCandlish, Kaplan, Amodei: An Empirical Model of Large-Batch Training (2018), equations
        2.6 to 2.11, for updates and rows; the best batch follows from them.

    Example:
        >>> found = advice(1000.0, (800.0, 1250.0), rows=1024, microbatch_size=32,
        ...     seconds_per_row=0.001, seconds_per_update=0.008)
        >>> round(found.best_rows), round(found.extra_rows, 3)
        (89, 1.024)
        >>> print(found.verdict)
        Such a large batch does not pay here: about 89.4 rows take 0.58 times the time.
    """
    given = {
        "rows": rows,
        "seconds_per_row": seconds_per_row,
        "seconds_per_update": seconds_per_update,
    }
    for name, value in given.items():
        if not (is_real(value) and math.isfinite(value) and value > 0):
            raise ValueError(
                f"{name} must be a positive number. Got {name}={value!r}. "
                "Measure it over many updates at two batch sizes."
            )

    low, high = interval
    seen = math.isfinite(noise_scale)

    def best(scale: float) -> float:
        # A batch has at least one row.
        return max(1.0, math.sqrt(scale * seconds_per_update / seconds_per_row))

    def times(scale: float) -> float:
        """The time of the present batch, relative to the time of the best one."""

        def of(batch: float) -> float:
            return (1 + scale / batch) * (batch * seconds_per_row + seconds_per_update)

        return of(rows) / of(best(scale))

    def verdict(scale: float, low: float, high: float) -> str:
        if math.isinf(scale):
            return _WITHOUT_END if seen else _NO_SIGNAL
        return _verdict(rows, microbatch_size, best(scale), best(low), best(high), times(scale))

    time = times(noise_scale) if seen else 1.0
    return Advice(
        rows=rows,
        noise_scale=noise_scale,
        best_rows=best(noise_scale),
        best_low=best(low),
        best_high=best(high),
        time=time,
        extra_rows=rows / noise_scale if noise_scale else math.inf,
        extra_updates=noise_scale / rows,
        verdict=verdict(noise_scale, low, high),
        verdict_low=verdict(low, low, low),
        verdict_high=verdict(high, high, high),
        break_even=seconds_per_row * rows**2 / noise_scale if noise_scale else math.inf,
        seconds_per_row=seconds_per_row,
        seconds_per_update=seconds_per_update,
        rules=_rules(best(noise_scale) / rows) if time > _ALIKE else (),
    )


def _verdict(
    rows: float, microbatch_size: float, best: float, low: float, high: float, times: float
) -> str:
    if times <= _ALIKE:
        return f"{_number(rows)} rows are about right: no other batch saves a tenth of the time."
    if low <= rows <= high:
        return (
            f"Not certain yet: the best batch is about {_number(best)} rows, but "
            f"{_number(rows)} may be it too. Count more windows."
        )
    saved = f"about {_number(best)} rows take {1 / times:.2f} times the time"
    if rows < best:
        return f"A larger batch pays: {saved}. Keep the micro-batch and accumulate more of them."
    if best <= microbatch_size < rows:
        return f"Accumulation does not pay here: one micro-batch is enough; {saved}."
    return f"Such a large batch does not pay here: {saved}."


def _rules(factor: float) -> tuple[ScalingRule, ...]:
    return (
        ScalingRule("SGD", factor, None, "linear, with warm-up: Goyal et al. 2017"),
        ScalingRule(
            "Adam",
            math.sqrt(factor),
            (factor, factor),
            "square root: Malladi et al. 2022; epsilon / sqrt too",
        ),
        ScalingRule(
            "Adam",
            math.sqrt(factor),
            (1.0, factor),
            "same half-life in rows, at most this rate: Marek et al. 2025",
        ),
    )


def _number(value: float) -> str:
    if math.isinf(value):
        return "infinitely many"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
