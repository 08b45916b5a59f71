"""Verdicts: is an accumulated gradient that of the whole batch, and if not, what broke it.

An engine observes its user's training step; from what was observed, as arrays of NumPy, the errors
of all parameters follow, a tolerance derived from the dtype and from the model's own rounding, and
findings that name a cause.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from virtualbatch.result import Result

Kind = Literal[
    "weight",
    "sum_loss",
    "coupled_rows",
    "batchnorm",
    "regulariser",
    "stateful",
    "no_gradient",
    "low_precision",
    "non_finite",
    "last_window",
    "clipping",
    "per_microbatch",
    "stale_buffer",
]

# Parameters that a printed certificate shows, the worst first.
_MOST_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """One thing that breaks exactness, or that its owner should know.

    Args:
        kind: what it is. Of a loss or a model: "weight", "sum_loss", "coupled_rows", "batchnorm",
            "regulariser", "stateful", "no_gradient", "low_precision" or "non_finite"; of a
            training loop also "last_window", "clipping", "per_microbatch" or "stale_buffer".
        where: the layer, term, parameter or line.
        why: what was observed.
        fix: what to do.
    """

    kind: Kind
    where: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.why} Fix: {self.fix}"


@dataclass(frozen=True)
class Certificate(Result):
    """Whether accumulation gives the update of the whole batch.

    Args:
        exact: whether every error is within the tolerance and nothing else differs.
        max_error: the largest error of `parameters`; infinity where something is not finite.
        tolerance: what rounding alone may make of an error.
        parameters: parameter name -> largest difference between accumulated and uncut gradient,
            in units of that parameter's largest gradient, to which its measured rounding is added.
        findings: what breaks exactness, the gravest first, and what is worth knowing.
        loss_error: the same of the loss.
        notes: how it was compared, in sentences.
    """

    exact: bool
    max_error: float
    tolerance: float
    parameters: Mapping[str, float]
    findings: tuple[Finding, ...]
    loss_error: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def raise_if_inexact(self) -> None:
        """Raises what is wrong; does nothing if the gradient is exact.

        Raises:
            ValueError: the certificate is not exact; the text is that of the certificate.
        """
        if not self.exact:
            raise ValueError(str(self))

    def __str__(self) -> str:
        lines = [self._headline(), *map(str, self.findings), *self.notes]
        lines += [f"{error:12.2e}  {name}" for name, error in self._worst()]
        hidden = len(self.parameters) - _MOST_SHOWN
        if hidden > 0:
            lines.append(f"{'':12}  and {hidden} more parameters")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        findings = "".join(
            f"<li><b>{escape(found.kind)}</b> at {escape(found.where)}: {escape(found.why)} "
            f"<i>{escape(found.fix)}</i></li>"
            for found in self.findings
        )
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{error:.2e}</td></tr>" for name, error in self._worst()
        )
        return (
            f"<p><b>{escape(self._headline())}</b></p><ul>{findings}</ul><table>{rows}</table>"
            f"<p>{escape(' '.join(self.notes))}</p>"
        )

    def _headline(self) -> str:
        verdict = "exact" if self.exact else "NOT exact"
        return f"{verdict}: largest error {self.max_error:.2e}, tolerance {self.tolerance:.2e}"

    def _worst(self) -> list[tuple[str, float]]:
        return sorted(self.parameters.items(), key=lambda item: -item[1])[:_MOST_SHOWN]


def derived_tolerance(epsilon: float, narrowest: float, rows: int) -> float:
    """What rounding may make of the error of a sum over rows.

    Sums of n terms in two orders differ by about sqrt(n) roundings of their terms. The factor 64
    stands for the roundings inside a term; what a model adds to that is measured, not guessed.
    Where a model computes some values in fewer bits, those are rounded once each, whatever is
    summed: a share of a micro-batch is no power of two.

    Args:
        epsilon: distance from 1 to the next number of the dtype that sums are computed in.
        narrowest: the same of the narrowest dtype inside.
        rows: number of summands.

    Source:
        Higham: Accuracy and Stability of Numerical Algorithms, section 4.2 (2002).
    """
    inside = 4 * narrowest if narrowest > epsilon else 0.0
    return 64 * epsilon * math.sqrt(rows) + inside
