"""From what was observed of a training step to a certificate.

The errors come first. Only if there are any, causes are tried on the gradients of single
micro-batches: the cause is the one whose arithmetic reproduces the whole batch's gradient.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from virtualbatch.certify import Certificate, Finding, derived_tolerance
from virtualbatch.rowwise import first_difference, first_not_finite, reduced_at, same_values
from virtualbatch.subject import Observed, Subject
from virtualbatch.weighting import explained

# Measured rounding is multiplied by this: two runs may happen to round alike.
_ROUNDING = 16
# What counts as a difference between values inside a model, in square roots of epsilon.
_COARSE = 1.0


class Scales(NamedTuple):
    """What a difference is measured in, so that the tolerance is the same for everything.

    Fields:
        gradients: parameter name -> its largest gradient, and its measured rounding.
        terms: the same of the loss.
    """

    gradients: dict[str, float]
    terms: float


def certified(subject: Subject) -> Certificate:
    """Runs a subject uncut and accumulated, and compares.

    Args:
        subject: see there.
    """
    tolerance = derived_tolerance(subject.epsilon, subject.rows)
    every = np.arange(subject.rows)
    whole = subject.alone(every)
    if not _finite(whole):
        broken = (_not_finite(subject, every),)
        infinite = dict.fromkeys(subject.parameters, float("inf"))
        notes = tuple(subject.notes)
        return Certificate(False, float("inf"), tolerance, infinite, broken, float("inf"), notes)
    coarse = _COARSE * subject.epsilon**0.5
    again = subject.alone(every, again=True)
    turned = subject.alone(every[::-1])
    mixed = subject.alone(np.random.default_rng(0).permutation(subject.rows))
    largest = max((_largest(g) for g in whole.gradients.values()), default=0.0)
    stateful = _differ(whole, again, coarse)
    ordered = _differ(whole, turned, coarse) or _differ(whole, mixed, coarse)
    # What depends on the order of rows is no rounding.
    alike = [] if stateful or ordered else [again, turned, mixed]
    scales = _scales(whole, alike, tolerance, largest)
    accumulated = subject.accumulated()
    errors = _errors(whole, accumulated, scales)
    loss_error = abs(sum(whole.terms.values()) - sum(accumulated.terms.values())) / scales.terms
    state_error = max(_state_errors(whole, accumulated).values(), default=0.0)
    max_error = max(errors.values(), default=0.0)
    exact = max_error <= tolerance and loss_error <= tolerance and state_error <= coarse
    findings: list[Finding] = []
    if max_error <= tolerance and loss_error <= tolerance and not exact:
        findings = [_kept(whole, accumulated)]
    elif not exact:
        findings = _causes(subject, whole, scales, tolerance, coarse, stateful)
    elif stateful:
        findings = [_stateful(subject, every, coarse)]
    findings += _advice(subject, whole)
    return Certificate(
        exact=exact,
        max_error=max_error,
        tolerance=tolerance,
        parameters=errors,
        findings=tuple(findings),
        loss_error=loss_error,
        notes=tuple(subject.notes),
    )


def _causes(
    subject: Subject,
    whole: Observed,
    scales: Scales,
    tolerance: float,
    coarse: float,
    stateful: bool,
) -> list[Finding]:
    """Why the accumulated gradient is another one; at least one finding."""
    union = np.concatenate(subject.pieces[:2])
    records = subject.records(union)
    parts = [subject.records(piece) for piece in subject.pieces[:2]]
    if stateful:
        return [_stateful(subject, np.arange(subject.rows), coarse)]
    different = first_difference(records, parts, coarse)
    if different is not None and subject.weighs_itself:
        return [_coupled(different, different.where)]
    reduced = reduced_at(records, parts)
    place = reduced.where if reduced else "loss_fn"
    findings = []
    wrong = []
    for term, name in subject.places(place, whole.terms).items():
        found = explained(subject, term, name, scales, tolerance)
        if found.right:
            continue
        wrong.append(name)
        if found.finding is not None:
            findings.append(found.finding)
    if findings or not wrong:
        return findings or [_unexplained(subject)]
    return [_coupled(different, wrong[0])]


def _coupled(record: Any, place: str) -> Finding:
    where = record.where if record is not None else place
    if record is not None and "BatchNorm" in record.layer:
        return Finding(
            "batchnorm",
            where,
            f"{record.layer} in training mode normalises each micro-batch with its own mean and "
            "variance, so its outputs are not those of the whole batch.",
            "Use GroupNorm or LayerNorm, or put it in evaluation mode, or choose the largest "
            "micro-batch that fits.",
        )
    why = (
        "Its values for the rows of a micro-batch change with the other rows of the batch."
        if record is not None
        else "The loss is no mean over rows of anything: a function of a mean is not a mean."
    )
    return Finding(
        "coupled_rows",
        where,
        why,
        "Compute it from each row alone, or run this loss on the uncut batch.",
    )


def _stateful(subject: Subject, rows: np.ndarray, coarse: float) -> Finding:
    first, second = subject.records(rows), subject.records(rows, again=True)
    where = "loss_fn"
    for a, b in zip(first, second, strict=False):
        if not same_values(a, b, coarse):
            where = a.where
            break
    return Finding(
        "stateful",
        where,
        "The same rows give another result the second time: it keeps something between calls.",
        "Freeze that state during the window, or update it once after the window.",
    )


def _kept(whole: Observed, accumulated: Observed) -> Finding:
    errors = _state_errors(whole, accumulated)
    return Finding(
        "stateful",
        max(errors, key=lambda name: errors[name]),
        "Gradient and loss are those of the whole batch, but this value is not: each micro-batch "
        "changes it, and the whole batch changes it once.",
        "Compute it from sums over rows, or update it once after the window.",
    )


def _unexplained(subject: Subject) -> Finding:
    if subject.narrow:
        return Finding(
            "low_precision",
            ", ".join(subject.narrow),
            "Every micro-batch's gradient is right, and their sum is not.",
            "Sum in float32 or wider.",
        )
    return Finding(
        "stateful",
        "the window",
        "Each micro-batch alone gives the right gradient; together, one after another, they do "
        "not: one of them changes what the next one computes.",
        "Look for state that loss_fn changes, and update it once after the window.",
    )


def _not_finite(subject: Subject, every: np.ndarray) -> Finding:
    for name, value in subject.parameters.items():
        if not np.all(np.isfinite(value)):
            return Finding(
                "non_finite",
                f"parameter {name}",
                f"{np.sum(~np.isfinite(value))} of its values are NaN or infinite.",
                "Load weights from before the step that broke them.",
            )
    for name, leaf in subject.leaves.items():
        if leaf.dtype.kind in "fc" and not np.all(np.isfinite(leaf)):
            bad = np.flatnonzero(~np.isfinite(leaf).reshape(len(leaf), -1).all(1))
            return Finding(
                "non_finite",
                f"{name}, {_rows(bad.tolist())}",
                "The data holds NaN or infinity.",
                "Clean these rows, or leave them out of the batch.",
            )
    found = first_not_finite(subject.records(every), subject.rows)
    if found is None:
        return Finding(
            "non_finite",
            "the backward pass",
            "The loss's values are finite and its gradient is not.",
            "Look for a square root or a norm at 0, and add a small number inside.",
        )
    record, rows = found
    return Finding(
        "non_finite",
        f"{record.where}, {_rows(rows)}" if rows else record.where,
        "It is the first to compute NaN or infinity.",
        "Look for a logarithm, a division or an exponential of a value out of range.",
    )


def _advice(subject: Subject, whole: Observed) -> Iterator[Finding]:
    for name, gradient in whole.gradients.items():
        if gradient is None:
            yield Finding(
                "no_gradient",
                name,
                "The loss does not depend on this parameter.",
                "Freeze it if that is meant; else look for detach(), item() or an unused layer.",
            )


def _scales(whole: Observed, alike: Sequence[Observed], tolerance: float, largest: float) -> Scales:
    gradients = {}
    for name, gradient in whole.gradients.items():
        noise = max(
            (_largest(_minus(gradient, other.gradients[name])) for other in alike), default=0.0
        )
        # A gradient that should be 0 is the rounding of far larger numbers.
        gradients[name] = _largest(gradient) + _ROUNDING * noise / tolerance + 1e-4 * largest or 1.0
    loss = sum(whole.terms.values())
    noise = max((abs(loss - sum(other.terms.values())) for other in alike), default=0.0)
    size = max((abs(term) for term in whole.terms.values()), default=0.0)
    return Scales(gradients, size + _ROUNDING * noise / tolerance or 1.0)


def _errors(whole: Observed, other: Observed, scales: Scales) -> dict[str, float]:
    return {
        name: _largest(_minus(gradient, other.gradients[name])) / scales.gradients[name]
        for name, gradient in whole.gradients.items()
    }


def _state_errors(whole: Observed, other: Observed) -> dict[str, float]:
    return {
        name: _largest(_minus(value, other.state[name])) / (_largest(value) or 1.0)
        for name, value in whole.state.items()
        if name in other.state
    }


def _differ(a: Observed, b: Observed, relative: float) -> bool:
    largest = max((_largest(g) for g in a.gradients.values()), default=0.0)
    loss, other = sum(a.terms.values()), sum(b.terms.values())
    return abs(loss - other) > relative * max(abs(loss), 1e-30) or any(
        _largest(_minus(gradient, b.gradients[name])) > relative * largest
        for name, gradient in a.gradients.items()
    )


def _finite(found: Observed) -> bool:
    return bool(np.all(np.isfinite(list(found.terms.values())))) and all(
        g is None or bool(np.all(np.isfinite(g))) for g in found.gradients.values()
    )


def _minus(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    if a is None:
        return b
    return a if b is None else a - b


def _largest(a: np.ndarray | None) -> float:
    return 0.0 if a is None else float(np.max(np.abs(a), initial=0.0))


def _rows(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:5]))
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}{more}"
