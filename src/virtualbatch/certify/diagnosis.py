"""Turns the observations of a training step into a certificate.

Errors are computed first. If there are any, possible causes are tried on the gradients of single
micro-batches. The right cause is the one whose arithmetic reproduces the whole batch's gradient.
"""

from collections.abc import Iterator

import numpy as np

from virtualbatch.certify.activations import (
    Activation,
    first_difference,
    first_not_finite,
    reduced_at,
    same_values,
)
from virtualbatch.certify.certificate import Certificate, Finding, derived_tolerance
from virtualbatch.certify.errors import (
    Scales,
    all_finite,
    differ,
    gradient_errors,
    measured_scales,
    state_errors,
    total_loss,
)
from virtualbatch.certify.step import Observed, TrainingStep
from virtualbatch.certify.weights import explained


def certified(subject: TrainingStep) -> Certificate:
    """Runs a training step uncut and accumulated, and compares the two.

    Args:
        subject: the training step.
    """
    tolerance = derived_tolerance(subject.epsilon, subject.narrowest, subject.rows)
    every = np.arange(subject.rows)
    whole = subject.alone(every)
    if not all_finite(whole):
        return broken(subject, _not_finite(subject, every))
    coarse = max(subject.epsilon**0.5, tolerance)
    again = subject.alone(every, again=True)
    turned = subject.alone(every[::-1])
    mixed = subject.alone(np.random.default_rng(0).permutation(subject.rows))
    stateful = differ(whole, again, coarse)
    ordered = differ(whole, turned, coarse) or differ(whole, mixed, coarse)
    # A difference that depends on the order of rows is not rounding.
    alike = [] if stateful or ordered else [again, turned, mixed]
    scales = measured_scales(whole, alike, tolerance)
    # The second window shows what the first one left behind.
    subject.accumulated()
    accumulated = subject.accumulated()
    errors = gradient_errors(whole, accumulated, scales)
    loss_error = abs(total_loss(whole) - total_loss(accumulated)) / scales.loss
    max_error = max(errors.values(), default=0.0)
    same_gradient = max_error <= tolerance and loss_error <= tolerance
    kept = state_errors(whole, accumulated)
    exact = same_gradient and max(kept.values(), default=0.0) <= coarse
    findings: list[Finding] = []
    if same_gradient and not exact:
        findings = [_kept(max(kept, key=lambda name: kept[name]))]
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


def broken(subject: TrainingStep, finding: Finding) -> Certificate:
    """The certificate of a step whose gradients cannot be compared.

    Args:
        subject: the training step.
        finding: the reason.
    """
    return Certificate(
        exact=False,
        max_error=float("inf"),
        tolerance=derived_tolerance(subject.epsilon, subject.narrowest, subject.rows),
        parameters=dict.fromkeys(subject.parameters, float("inf")),
        findings=(finding,),
        loss_error=float("inf"),
        notes=tuple(subject.notes),
    )


def _causes(
    subject: TrainingStep,
    whole: Observed,
    scales: Scales,
    tolerance: float,
    coarse: float,
    stateful: bool,
) -> list[Finding]:
    """Why the accumulated gradient differs; at least one finding."""
    union = np.concatenate(subject.pieces[:2])
    activations = subject.activations(union)
    parts = [subject.activations(piece) for piece in subject.pieces[:2]]
    if stateful:
        return [_stateful(subject, np.arange(subject.rows), coarse)]
    different = first_difference(activations, parts, coarse)
    if different is not None and subject.weighs_itself:
        return [_coupled(subject, different, different.where)]
    reduced = reduced_at(activations, parts)
    place = reduced.where if reduced else subject.place
    findings = []
    wrong = []
    for term, name in subject.places(place, whole.terms).items():
        found = explained(subject, term, name, scales, tolerance)
        if found.right:
            continue
        wrong.append(name)
        if found.finding is not None:
            findings.append(found.finding)
    if findings:
        return findings
    if not wrong:
        return [_of_the_sum(subject)]
    return [_coupled(subject, different, wrong[0])]


# An epsilon above this belongs to half precision.
_HALF = 1e-4
# The reason of a finding that was observed in the values themselves.
SEES_OTHER_ROWS = (
    "Its values for the rows of a micro-batch change with the other rows of the batch."
)


def _coupled(subject: TrainingStep, activation: Activation | None, place: str) -> Finding:
    where = activation.where if activation is not None else place
    if activation is not None and "BatchNorm" in activation.layer:
        return Finding(
            "batchnorm",
            where,
            f"{activation.layer} in training mode normalises each micro-batch with its own mean "
            "and variance, so its outputs are not those of the whole batch.",
            "Use GroupNorm or LayerNorm, or put it in evaluation mode, or choose the largest "
            "micro-batch that fits.",
        )
    why = (
        SEES_OTHER_ROWS
        if activation is not None
        else "The loss is not a mean over rows: a function of a mean is not a mean."
    )
    return Finding("coupled_rows", where, why, subject.way_out)


def _stateful(subject: TrainingStep, rows: np.ndarray, coarse: float) -> Finding:
    first, second = subject.activations(rows), subject.activations(rows, again=True)
    where = subject.place
    for a, b in zip(first, second, strict=False):
        if not same_values(a, b, coarse):
            where = a.where
            break
    return Finding(
        "stateful",
        where,
        "The same rows give another result the second time, so it keeps something between calls.",
        "Freeze that state during the window, or update it once after the window. Random numbers "
        "must come from the framework's own default generator.",
    )


def _kept(name: str) -> Finding:
    return Finding(
        "stateful",
        name,
        "Gradient and loss are those of the whole batch, but this value is not: each micro-batch "
        "changes it, and the whole batch changes it once.",
        "Compute it from sums over rows, or update it once after the window.",
    )


def _of_the_sum(subject: TrainingStep) -> Finding:
    """Why the sum is wrong if each micro-batch is right."""
    if subject.narrow:
        return Finding(
            "low_precision",
            ", ".join(subject.narrow),
            "Every micro-batch's gradient is right, and their sum is not.",
            "Sum in float32 or wider.",
        )
    if subject.narrowest > _HALF:
        return Finding(
            "weight",
            subject.place,
            "The gradients of micro-batches do not add up to that of the batch. Half precision "
            "hides the cause.",
            'Pass weight=..., what the mean was divided by, or weight="sum". To find it, run '
            "certify with the model and its inputs in float32.",
        )
    return Finding(
        "stateful",
        "the window",
        "Each micro-batch alone gives the right gradient; together, one after another, they do "
        "not.",
        "If loss_fn changes something that the next micro-batch reads, update that once after the "
        "window. Otherwise this is a bug of virtualbatch: please report it.",
    )


def _not_finite(subject: TrainingStep, every: np.ndarray) -> Finding:
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
    found = first_not_finite(subject.activations(every), subject.rows)
    if found is None:
        return Finding(
            "non_finite",
            "the backward pass",
            "The loss's values are finite and its gradient is not.",
            "Look for a square root or a norm at 0, and add a small number inside.",
        )
    activation, rows = found
    return Finding(
        "non_finite",
        f"{activation.where}, {_rows(rows)}" if rows else activation.where,
        "It is the first to compute NaN or infinity.",
        "Look for a logarithm, a division or an exponential of a value out of range.",
    )


def _advice(subject: TrainingStep, whole: Observed) -> Iterator[Finding]:
    for name, gradient in whole.gradients.items():
        if gradient is None:
            yield Finding(
                "no_gradient",
                name,
                "The loss does not depend on this parameter.",
                "Freeze it if that is meant; else look for detach(), item() or an unused layer.",
            )


def _rows(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:5]))
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}{more}"
