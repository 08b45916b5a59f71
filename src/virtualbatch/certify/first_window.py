"""Checks on a few of the user's rows that gradients add up, before the first window of a loss.

The loss runs on two groups of a few rows, alone and together. If the gradients of the groups do not
add up to the gradient of both, the rows are certified. The certificate distinguishes rounding from
a mistake, and names the mistake.
"""

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from virtualbatch.certify.certificate import Certificate, Finding
from virtualbatch.certify.diagnosis import SEES_OTHER_ROWS
from virtualbatch.certify.of_signal import raise_if_of_signal
from virtualbatch.certify.proven import Proven, untried
from virtualbatch.certify.trial import Distance, Trial, parts, reason_of
from virtualbatch.certify.users_line import is_ours

_log = logging.getLogger("virtualbatch")

# Row numbers of two parts.
_Pair = tuple[list[int], list[int]]

# With right weights the sum is off by about one epsilon of the narrowest dtype, with wrong ones by
# 30 or more. Everything above this limit is certified first, so rounding alone raises no error.
ROUNDING = 16.0
# A reason that may not apply to other rows.
NO_GRADIENT = "its gradient is 0, or not finite"
# Kind of a finding -> the page that explains it. Other kinds are not the loss's fault.
_PAGES = {
    "weight": "docs/guides/weights.md",
    "sum_loss": "docs/guides/weights.md",
    "regulariser": "docs/guides/weights.md",
    "coupled_rows": "docs/guides/rowwise.md",
    "stateful": "docs/guides/state.md",
}


def prove(
    trial: Trial,
    why: Callable[[Exception], str],
    again: bool = False,
    more: Sequence[_Pair] = (),
) -> str | None:
    """Checks on a few rows that the gradients of parts add up.

    Args:
        trial: the loss and the rows.
        why: error -> why nothing could be tried, in words.
        again: whether another attempt, in another state of the layers, follows a failure.
        more: pairs of parts to try besides those that `parts` chooses.

    Returns:
        None; or the reason, if the loss could not be tried.

    Raises:
        ValueError: the gradients of parts do not add up to the gradient of the whole, or the
            engine raises it.
        TypeError: the engine raises it.
    """
    found: list[Distance] = []
    reason = "there is one row"
    try:
        chosen = [*parts(trial), *more]
    except Exception as error:  # the user's arrays, some rows of which may not be accessible
        return reason_of(error, why)
    for a, b in chosen:
        try:
            distance = trial.distance(a, b)
        except Exception as error:  # the user's code, which may not support these rows
            if is_ours(error) and not again:
                raise
            reason = reason_of(error, why)
            continue
        if distance is None:
            return _by_certificates(trial, chosen, why)
        if not distance.off > ROUNDING:
            if math.isfinite(distance.off):
                found.append(distance)
            reason = NO_GRADIENT
            continue
        try:
            certificate = trial.certificate(*_cut_like(a, b))
        except Exception as error:  # the user's code again
            reason = reason_of(error, why)
            continue
        if not certificate.exact:
            return _refused(trial, _explained(trial, _largest(chosen), certificate), (a, b))
        found.append(distance)
    if not found:
        return reason
    constant = [
        name
        for name in found[0].constant
        if all(name in distance.constant for distance in found)
        and any(distance.constant[name] for distance in found)
    ]
    if constant:
        raise ValueError(
            "Every term of a loss must have a gradient. "
            f"Got {', '.join(map(repr, constant))} without one, although it is added to the loss. "
            "Return it beside the loss, with has_aux=True."
        )
    if all(distance.is_same for distance in found):
        _log.warning(
            "The loss is the same whatever rows it is given. If it uses a whole batch from outside "
            "instead of its argument, micro-batches save no memory. See docs/guides/rows.md."
        )
    return None


def adds_up(trial: Trial, chosen: Sequence[_Pair], why: Callable[[Exception], str]) -> bool | str:
    """Whether the gradients of parts add up to the gradient of the whole. Looks for no cause.

    Args:
        trial: the loss and the rows.
        chosen: what `parts` returned.
        why: error -> why nothing could be tried, in words.

    Returns:
        Whether they add up; or the reason, if that could not be tried.
    """
    reason = "there is one row"
    is_tried = False
    for a, b in chosen:
        try:
            distance = trial.distance(a, b)
        except Exception as error:  # the user's code, which may not support these rows
            reason = reason_of(error, why)
            continue
        if distance is None:
            return "it draws random numbers"
        if distance.off > ROUNDING:
            return False
        is_tried = is_tried or math.isfinite(distance.off)
        reason = NO_GRADIENT
    return is_tried or reason


def conclude(
    known: Proven, loss_fn: Any, weight: Any, structure: Hashable, trial: Trial, reason: str | None
) -> None:
    """Remembers a loss that was tried; logs why if it could not be tried.

    Args:
        known: the losses that were tried.
        loss_fn: the loss function.
        weight: as passed to the engine.
        structure: see `Proven.seen`.
        trial: the trial of the loss.
        reason: the result of `prove`.
    """
    if reason == NO_GRADIENT:
        # Other rows may have a gradient, so this is logged once and the loss is tried again.
        known.tell_once(loss_fn, weight, reason)
        return
    if reason is not None:
        untried(reason)
    known.remember(loss_fn, weight, structure, trial.seen)


def _by_certificates(
    trial: Trial, chosen: Sequence[_Pair], why: Callable[[Exception], str]
) -> str | None:
    """Like `prove`, for a loss that draws random numbers: the largest pair, and empty parts."""
    reason: str | None = None
    for a, b in [_largest(chosen), *(pair for pair in chosen if pair[0][0] in trial.empty)]:
        try:
            certificate = trial.certificate(*_cut_like(a, b))
        except Exception as error:  # the user's code, which may not support these rows
            reason = reason_of(error, why)
            continue
        if not certificate.exact:
            return _refused(trial, _explained(trial, _largest(chosen), certificate), (a, b))
    return reason


def _largest(chosen: Sequence[_Pair]) -> _Pair:
    return max(chosen, key=lambda pair: len(pair[0]) + len(pair[1]))


def _cut_like(a: list[int], b: list[int]) -> tuple[list[int], int]:
    """Rows and a size for which an even cut gives these parts; the larger part comes first."""
    first, second = (b, a) if len(a) < len(b) else (a, b)
    return [*first, *second], len(first)


def _explained(trial: Trial, largest: _Pair, of_pair: Certificate) -> Finding:
    """What is wrong, from a certificate of all rows of the largest pair.

    If that certificate shows no mistake, the certificate of the failing pair is used.
    """
    rows = [row for part in largest for row in part]
    try:
        of_all = trial.certificate(rows, math.ceil(len(rows) / 3))
    except Exception as error:  # the user's code, on another number of rows
        raise_if_of_signal(error)
        return of_pair.findings[0]
    return (of_pair if of_all.exact else of_all).findings[0]


def _refused(trial: Trial, finding: Finding, failing: _Pair) -> str | None:
    """Raises an error for a mistake of the loss; returns the reason if it is not a mistake."""
    page = _PAGES.get(finding.kind)
    if page is None:
        return f"{finding.kind} at {finding.where}: {finding.why}"
    group = _group(trial, failing) if finding.why == SEES_OTHER_ROWS else None
    if group is not None:
        trial.seen = trial.seen._replace(group=group)
        _log.warning(
            "The rows of this loss belong together by %d, and no micro-batch may cut them apart. "
            "See docs/guides/rows.md.",
            group,
        )
        return None
    if trial.is_rowwise:
        raise sees_other_rows(
            f"values that change with the other rows: {finding.kind} at {finding.where}"
        )
    raise ValueError(
        "The gradients of micro-batches must add up to that of their batch. "
        f"Got a loss whose first rows show that they do not: {finding.kind} at {finding.where}. "
        f"{finding.why} {finding.fix} See {page}; check=False turns this check off."
    )


def sees_other_rows(got: str) -> ValueError:
    """The error for a function wrapped by `rowwise` that mixes rows.

    Args:
        got: what was observed, without a full stop.
    """
    return ValueError(
        f"What rowwise wraps must compute each row from that row alone. Got {got}. "
        "Return what each row gives, and compare rows in the loss, which sees all of them. "
        "See docs/guides/rowwise.md; check=False turns this check off."
    )


def _group(trial: Trial, failing: _Pair) -> int | None:
    """The size of groups of rows that belong together; None if gradients do not add up for any.

    Args:
        trial: the loss and the rows.
        failing: parts whose gradients do not add up. If they are extended to whole groups, their
            gradients must add up. Otherwise the mistake is another one.
    """
    start = trial.empty.start
    for group in (2, 3, 4):
        if any(size % group for size in trial.sizes) or trial.rows < start + 3 * group:
            continue
        rows = [*range(start, start + 3 * group)]
        first, others = rows[:group], rows[group:]
        try:
            found = [
                trial.distance(*parts)
                for parts in ((first, others[:group]), (first, others), _whole(failing, group))
            ]
        except Exception as error:  # the user's code, which may not support so many rows
            raise_if_of_signal(error)
            continue
        if all(distance is not None and distance.off <= ROUNDING for distance in found):
            return group
    return None


def _whole(parts: _Pair, group: int) -> _Pair:
    """The parts, extended to whole groups. Each group is in one part only."""
    numbers = [list(dict.fromkeys(row // group for row in part)) for part in parts]
    first, second = ([n for n in numbers[0] if n not in numbers[1]], numbers[1])
    if not first:
        first, second = second[:1], second[1:]
    a, b = ([n * group + k for n in part for k in range(group)] for part in (first, second))
    return a, b
