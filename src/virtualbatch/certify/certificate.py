"""Certificates: whether accumulation gives the gradient of the whole batch, and if not, why.

An engine observes the user's training step and hands over NumPy arrays. From these follow the error
of every parameter, a tolerance derived from the dtype and the model's own rounding, and findings
that name a cause.
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
    """Something that breaks exactness, or that you should know.

    Args:
        kind: for a loss or a model "weight", "sum_loss", "coupled_rows", "batchnorm",
            "regulariser", "stateful", "no_gradient", "low_precision" or "non_finite"; for a
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
        max_error: the largest error of `parameters`; infinity if something is not finite.
        tolerance: the largest error that rounding alone can cause.
        parameters: parameter name -> largest difference between the accumulated and the uncut
            gradient, divided by that parameter's largest gradient plus its measured rounding.
        findings: what breaks exactness, most serious first, then what is worth knowing.
        loss_error: the error of the loss, in the same units.
        notes: how the gradients were compared, in sentences.
    """

    exact: bool
    max_error: float
    tolerance: float
    parameters: Mapping[str, float]
    findings: tuple[Finding, ...]
    loss_error: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def raise_if_inexact(self) -> None:
        """Raises an error with the text of the certificate, unless it is exact.

        Raises:
            ValueError: the certificate is not exact.
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
            f"<b>Fix:</b> {escape(found.fix)}</li>"
            for found in self.findings
        )
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{error:.2e}</td></tr>" for name, error in self._worst()
        )
        hidden = len(self.parameters) - _MOST_SHOWN
        more = f"<p>and {hidden} more parameters</p>" if hidden > 0 else ""
        return (
            f"<p><b>{escape(self._headline())}</b><br>{escape(' '.join(self.notes))}</p>"
            f"{f'<ul>{findings}</ul>' if findings else ''}"
            f"<table><tr><th>parameter</th><th>relative error</th></tr>{rows}</table>{more}"
        )

    def _headline(self) -> str:
        verdict = "exact" if self.exact else "NOT exact"
        return f"{verdict}: largest error {self.max_error:.2e}, tolerance {self.tolerance:.2e}"

    def _worst(self) -> list[tuple[str, float]]:
        return sorted(self.parameters.items(), key=lambda item: -item[1])[:_MOST_SHOWN]


def derived_tolerance(epsilon: float, narrowest: float, rows: int) -> float:
    """The largest error that rounding can cause in a sum over rows.

    Sums of n terms in two orders differ by about sqrt(n) roundings of their terms. The factor 64
    covers the roundings inside a term. The model's own rounding is not part of this: it is
    measured. Values that a model computes in fewer bits are rounded once more, because the share of
    a micro-batch is not a power of two.

    Args:
        epsilon: distance from 1 to the next number, in the dtype of the sums.
        narrowest: the same distance in the narrowest dtype of the model.
        rows: number of summands.

    Source:
        Higham: Accuracy and Stability of Numerical Algorithms, section 4.2 (2002).
    """
    inside = 4 * narrowest if narrowest > epsilon else 0.0
    return 64 * epsilon * math.sqrt(rows) + inside
