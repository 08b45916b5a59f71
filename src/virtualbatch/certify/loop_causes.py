"""Finds the mistake in a training loop, with runs that each show one kind of mistake."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from virtualbatch.certify.certificate import Finding

State = Mapping[str, np.ndarray]

# Measured rounding is multiplied by this, because two runs may round alike by chance.
_ROUNDING = 16
# Two gradients count as clipped to one norm if their norms differ by no more than this share.
_ONE_NORM = 1e-4
# A ratio is reported only if it fits this well.
_RATIO = 1e-3
# A mistake in the sum changes an update by more than this share, a narrow dtype by less. The first
# limit is used if equal micro-batches are wrong too, the second if they are right.
_NARROW_ALIKE, _NARROW = 1 / 64, 1e-5

# Entries of the state that a finding names.
_MOST_NAMED = 4


class Probe(NamedTuple):
    """How states are compared.

    Fields:
        before: the state from which every run starts.
        steps: micro-batches of a full window.
        tolerance: the largest error that counts as rounding.
        epsilon: epsilon of the state's dtype.
        whole: the expected state.
        turned: the expected state with rows in another order, which differs by rounding.
    """

    before: State
    steps: int
    tolerance: float
    epsilon: float
    whole: State
    turned: State

    def errors(self, found: State, due: State) -> dict[str, float]:
        """Entry -> its difference, relative to the change that the updates make to it."""
        result = {}
        for name, value in due.items():
            rounding = _largest(self.turned[name] - self.whole[name])
            # A small update of a large number is rounded as coarsely as the number.
            rounding = _ROUNDING * rounding + 4 * self.epsilon * _largest(value)
            changed = _largest(value - self.before[name])
            unit = changed + rounding / self.tolerance or 1.0
            result[name] = _largest(found[name] - value) / unit
        return result

    def wrong(self, found: State, due: State) -> list[str]:
        """Entries that differ from the expected state."""
        errors = self.errors(found, due)
        return [name for name, error in errors.items() if error > self.tolerance]

    def same(self, found: State, due: State) -> bool:
        """Whether all entries are as expected."""
        return not self.wrong(found, due)

    def change(self, found: State, names: list[str]) -> np.ndarray:
        """The change that a run made to some entries, as one vector."""
        return np.concatenate([(found[name] - self.before[name]).reshape(-1) for name in names])


class Runs(NamedTuple):
    """Runs of the loop; each starts from the same state.

    Fields:
        due: whole batches -> the state after ordinary training on them.
        accumulated: whole batches -> the state after the loop on their micro-batches.
        window: micro-batches -> the state after the loop on them.
        in_one_call: whole batches -> the state as from `due`, but with one call of the loop.
        pieces: the micro-batches of the first batch that have the full size.
    """

    due: Callable[..., State]
    accumulated: Callable[..., State]
    window: Callable[[list[Any]], State]
    in_one_call: Callable[[list[Any]], State]
    pieces: list[Any]


def causes(probe: Probe, runs: Runs, first: Any, second: Any, short: Any) -> tuple[Finding, ...]:
    """Names the mistakes of a loop whose state is not as expected.

    Args:
        probe: how states are compared.
        runs: the runs of the loop.
        first: a whole batch.
        second: another whole batch with as many rows.
        short: rows for a window of fewer micro-batches.
    """
    once, one = runs.accumulated(first), runs.due(first)
    if probe.same(once, one):
        return (_of_later_windows(probe, runs, first, second, short),)
    alike, piece = runs.window([runs.pieces[0]] * probe.steps), runs.due(runs.pieces[0])
    errors = [*probe.errors(once, one).values(), *probe.errors(alike, piece).values()]
    if max(errors) > (_NARROW if probe.same(alike, piece) else _NARROW_ALIKE):
        return (_of_one_window(probe, runs, once, one),)
    narrow = Finding(
        "low_precision",
        _listed(probe.wrong(once, one)),
        f"The update is right to {max(errors):.1e} and no better, as if a narrower dtype was used.",
        "Sum in the dtype of the parameters or a wider one, and compute shares and scales in it.",
    )
    # A second mistake must change the update by more than the narrow dtype does.
    probe = probe._replace(tolerance=_NARROW_ALIKE)
    batches = [first, second, short]
    if probe.same(runs.accumulated(*batches), runs.due(*batches)):
        return (narrow,)
    return narrow, _of_later_windows(probe, runs, first, second, short)


def _of_later_windows(probe: Probe, runs: Runs, first: Any, second: Any, short: Any) -> Finding:
    due, accumulated = runs.due, runs.accumulated
    one = due(first)
    wrong = probe.wrong(accumulated(first, second), due(first, second))
    # Without accumulation, one call and two calls differ only if a buffer is not emptied.
    if wrong and probe.same(runs.in_one_call([first, second]), due(first, second)):
        return Finding(
            "per_microbatch",
            _listed(wrong),
            "The first window is right and the second is not, although no gradient is carried "
            "over: the optimizer runs at every micro-batch, on zeros, and its momentum moves the "
            "weights.",
            "Step the optimizer once per window, after its last micro-batch.",
        )
    if wrong:
        return Finding(
            "stale_buffer",
            _listed(wrong),
            "The first window is right and the second is not: it starts from what the first left.",
            "Set the gradients to zero after each update, and only then.",
        )
    found, wanted = accumulated(first, short), due(first, short)
    names = probe.wrong(found, wanted)
    # A buffer may hold the dropped gradients, so only entries that should change count.
    if not set(probe.wrong(found, one)) & set(probe.wrong(wanted, one)):
        return Finding(
            "last_window",
            _listed(names),
            "A last window of fewer micro-batches is dropped: the state is that after the full "
            "ones.",
            "Update once more when the data ends in the middle of a window.",
        )
    part = _ratio(_minus(found, one, names), _minus(wanted, one, names))
    scaled = "" if part is None else f" Its update is {part:.3g} times what it should be."
    return Finding(
        "last_window",
        _listed(names),
        f"Full windows are right and a shorter last one is not.{scaled}",
        "Divide by what the window holds, not by accumulation_steps.",
    )


def _of_one_window(probe: Probe, runs: Runs, found: State, wanted: State) -> Finding:
    wrong = probe.wrong(found, wanted)
    counters = [name for name in wrong if found[name].size == 1]
    often = [
        name
        for name in counters
        if _ratio(found[name] - probe.before[name], wanted[name] - probe.before[name])
        == probe.steps
    ]
    right = [
        name
        for name, value in wanted.items()
        if name not in wrong and value.size > 1 and _largest(value - probe.before[name])
    ]
    if often or (counters and len(counters) == len(wrong)):
        return Finding(
            "per_microbatch",
            _listed(often or counters),
            f"It advances at every micro-batch, {probe.steps} times in a window, and not once per "
            "update.",
            "Step the optimizer and the schedule once per window, after its last micro-batch.",
        )
    groups = {name.partition(".")[0].partition("[")[0] for name in wrong}
    if right and not groups & {name.partition(".")[0].partition("[")[0] for name in right}:
        return Finding(
            "per_microbatch",
            _listed(wrong),
            "The weights are right and this is not: it is updated at every micro-batch.",
            "Update averages of the weights once per window, after the optimizer.",
        )
    if right:
        return Finding(
            "no_gradient",
            _listed(wrong),
            "These entries get another update than from the whole batch, and all others are "
            "right, so a part of their gradient is lost.",
            "Look for a parameter that is used twice or sparsely, and add all its gradients.",
        )
    return _of_all(probe, runs, wrong)


def _of_all(probe: Probe, runs: Runs, wrong: list[str]) -> Finding:
    """Names the mistake if all entries are wrong after a full window."""
    # With equal micro-batches even a mean of means is right.
    alike, wanted = runs.window([runs.pieces[0]] * probe.steps), runs.due(runs.pieces[0])
    names = probe.wrong(alike, wanted)
    if names:
        factor = _ratio(probe.change(alike, names), probe.change(wanted, names))
        if factor is None:
            return Finding(
                "per_microbatch",
                _listed(names),
                "Equal micro-batches give another update than one of them: the optimizer runs at "
                "every micro-batch, on a part of the gradient or on zeros.",
                "Step the optimizer once per window, after its last micro-batch.",
            )
        return Finding(
            "sum_loss",
            _listed(names),
            f"The update is {factor:.4g} times what it should be, with {probe.steps} micro-batches "
            "in a window.",
            "Divide the loss of each micro-batch by what the window counts, once.",
        )
    changes = [probe.change(runs.due(piece), wrong) for piece in runs.pieces]
    norms = np.array([np.linalg.norm(change) for change in changes])
    if np.sum(norms > (1 - _ONE_NORM) * norms.max()) > 1:
        return Finding(
            "clipping",
            _listed(wrong),
            "Gradients of single micro-batches are clipped to one norm, and then added.",
            "Clip once per window, after the last backward.",
        )
    return Finding(
        "weight",
        _listed(wrong),
        "Equal micro-batches are right and unequal ones are not: all micro-batches count alike, "
        "although their means were divided by different weights. It is a mean of means.",
        "Multiply the loss of each micro-batch by its share of the window's rows or tokens.",
    )


def _listed(names: list[str]) -> str:
    """Entries of the state in words, in their order."""
    hidden = len(names) - _MOST_NAMED
    more = f" and {hidden} more" if hidden > 0 else ""
    return ", ".join(names[:_MOST_NAMED]) + more if names else "the state"


def _ratio(found: np.ndarray, due: np.ndarray) -> float | None:
    """The factor between two vectors; None if they do not point the same way."""
    square = float(np.sum(due * due))
    if not square:
        return None
    factor = float(np.sum(found * due)) / square
    if _largest(found - factor * due) > _RATIO * max(_largest(found), _largest(due)):
        return None
    return round(factor) if abs(factor - round(factor)) < _RATIO else factor


def _minus(a: State, b: State, names: list[str]) -> np.ndarray:
    return np.concatenate([(a[name] - b[name]).reshape(-1) for name in names] or [np.zeros(1)])


def _largest(a: np.ndarray) -> float:
    return float(np.max(np.abs(a), initial=0.0))
