"""Which mistake a training loop makes, told by runs that each show one of them alone."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from virtualbatch.certify.certificate import Finding

State = Mapping[str, np.ndarray]

# Measured rounding is multiplied by this: two runs may happen to round alike.
_ROUNDING = 16
# Two gradients have one norm by clipping if it is the same to this part.
_ONE_NORM = 1e-4
# How well a ratio has to fit to be named.
_RATIO = 1e-3
# No mistake in what is summed changes an update by less, but a narrow dtype does: of equal
# micro-batches, and of any.
_NARROW_ALIKE, _NARROW = 1 / 64, 1e-5

# Entries of the state that a finding names.
_MOST_NAMED = 4


class Probe(NamedTuple):
    """How states are compared.

    Fields:
        before: the state that every run starts from.
        steps: micro-batches of a full window.
        tolerance: of an error.
        epsilon: of the state's dtype.
        whole: the state that is due.
        turned: the same with rows in another order, which differs by rounding.
    """

    before: State
    steps: int
    tolerance: float
    epsilon: float
    whole: State
    turned: State

    def errors(self, found: State, due: State) -> dict[str, float]:
        """Entry -> its difference, in units of what the updates change of it."""
        result = {}
        for name, value in due.items():
            rounding = _largest(self.turned[name] - self.whole[name])
            # A small update of a large number is rounded with the number.
            rounding = _ROUNDING * rounding + 4 * self.epsilon * _largest(value)
            changed = _largest(value - self.before[name])
            unit = changed + rounding / self.tolerance or 1.0
            result[name] = _largest(found[name] - value) / unit
        return result

    def wrong(self, found: State, due: State) -> list[str]:
        """Entries that are not what is due."""
        errors = self.errors(found, due)
        return [name for name, error in errors.items() if error > self.tolerance]

    def same(self, found: State, due: State) -> bool:
        """Whether all entries are what is due."""
        return not self.wrong(found, due)

    def change(self, found: State, names: list[str]) -> np.ndarray:
        """What a run changed of some entries, as one vector."""
        return np.concatenate([(found[name] - self.before[name]).reshape(-1) for name in names])


class Runs(NamedTuple):
    """What can be run, always from the same state.

    Fields:
        due: whole batches -> the state after ordinary training on them.
        accumulated: whole batches -> the state after the loop on their micro-batches.
        window: micro-batches -> the state after the loop on them.
        in_one_call: whole batches -> as `due`, but with one call of the loop.
        pieces: the micro-batches of the first batch, those of whole size.
    """

    due: Callable[..., State]
    accumulated: Callable[..., State]
    window: Callable[[list[Any]], State]
    in_one_call: Callable[[list[Any]], State]
    pieces: list[Any]


def causes(probe: Probe, runs: Runs, first: Any, second: Any, short: Any) -> tuple[Finding, ...]:
    """Names the mistakes of a loop whose state is not what is due.

    Args:
        probe: how states are compared.
        runs: what can be run.
        first: a whole batch.
        second: another one, of equal rows.
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
    # What is wrong beside it must be larger.
    probe = probe._replace(tolerance=_NARROW_ALIKE)
    batches = [first, second, short]
    if probe.same(runs.accumulated(*batches), runs.due(*batches)):
        return (narrow,)
    return narrow, _of_later_windows(probe, runs, first, second, short)


def _of_later_windows(probe: Probe, runs: Runs, first: Any, second: Any, short: Any) -> Finding:
    due, accumulated = runs.due, runs.accumulated
    one = due(first)
    wrong = probe.wrong(accumulated(first, second), due(first, second))
    # Without accumulating, nothing but a buffer that is not emptied tells one call from two.
    if wrong and probe.same(runs.in_one_call([first, second]), due(first, second)):
        return Finding(
            "per_microbatch",
            _listed(wrong),
            "The first window is right and the second is not, though nothing is carried over: the "
            "optimizer runs at every micro-batch, on zeros, and moves by its momentum.",
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
    # A buffer may hold what was dropped, so only what should have changed counts.
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
            "right: a part of their gradient is lost.",
            "Look for a parameter that is used twice or sparsely, and add all its gradients.",
        )
    return _of_all(probe, runs, wrong)


def _of_all(probe: Probe, runs: Runs, wrong: list[str]) -> Finding:
    """Everything is wrong in a full window: its scale, its weights or what is done to each."""
    # Of equal micro-batches even a mean of means is right.
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
        "Equal micro-batches are right and unequal ones are not: each counts alike, whatever its "
        "mean was divided by. It is a mean of means.",
        "Multiply the loss of each micro-batch by its share of the window's rows or tokens.",
    )


def _listed(names: list[str]) -> str:
    """Entries of the state in words, as they come: what is trained should be named first."""
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
