"""Checks on a few of the user's rows whether a function computes each row from that row alone.

The function runs on two groups of rows, alone and together. If the outputs differ by more than
rounding, the rows are certified; the certificate names the layer and the line.
"""

from collections.abc import Callable
from dataclasses import replace

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.first_window import ROUNDING, sees_other_rows
from virtualbatch.certify.trial import Trial, parts, reason_of
from virtualbatch.certify.users_line import is_ours

# Findings that mean that rows depend on each other. Others are not the function's fault.
_COUPLED = {"coupled_rows", "weight", "sum_loss", "regulariser", "stateful"}

_WAY_OUT = "Compute it from each row alone, or move it out of what rowwise wraps, into the loss."


def of_rows(found: Certificate) -> Certificate:
    """A certificate with fixes that suit a function that `rowwise` wraps, which has no loss.

    Args:
        found: the certificate of a loss: the function's outputs times random numbers.
    """
    findings = (replace(x, fix=_WAY_OUT) if x.kind in _COUPLED else x for x in found.findings)
    return replace(found, findings=tuple(findings))


def prove_rows(trial: Trial, why: Callable[[Exception], str], again: bool = False) -> str | None:
    """Tries a function on a few rows.

    Args:
        trial: the trial of a loss: the function's outputs times random numbers.
        why: error -> why nothing could be tried, in words.
        again: whether another attempt, in another state of the layers, follows a failure.

    Returns:
        None; or the reason, if the function could not be tried.

    Raises:
        ValueError: outputs differ between the parts and the whole, or the engine raises it.
        TypeError: the engine raises it.
    """
    reason: str | None = "there is one row"
    try:
        chosen = parts(trial)
    except Exception as error:  # the user's arrays, some rows of which may not be accessible
        return reason_of(error, why)
    for a, b in chosen:
        try:
            distance = trial.distance(a, b)
            if distance is not None and distance.off <= ROUNDING:
                reason = None
                continue
            first, second = (b, a) if len(a) < len(b) else (a, b)
            certificate = trial.certificate([*first, *second], len(first))
        except Exception as error:  # the user's code, which may not support these rows
            if is_ours(error) and not again:
                raise
            reason = reason_of(error, why)
            continue
        reason = None
        found = next((x for x in certificate.findings if x.kind in _COUPLED), None)
        if not certificate.exact and found is not None:
            raise sees_other_rows(
                f"values that change with the other rows: {found.kind} at {found.where}"
            )
    return reason
