"""Which of several weights a loss was divided by, found by trying a few of the user's rows."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from virtualbatch.certify.first_window import adds_up, prove
from virtualbatch.certify.trial import parts, rows_of_part
from virtualbatch.plan.out_of_memory import in_words
from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._certify.first_window import TorchTrial, is_not_recurrent, untouched
from virtualbatch.torch._handover import hooks_set_aside
from virtualbatch.torch._microbatch import Microbatch, known_rows
from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._replicas.found import quiet
from virtualbatch.torch._window import Program
from virtualbatch.window.terms import SUM

# Row numbers of two parts.
_Pair = tuple[list[int], list[int]]


class FoundWeight(NamedTuple):
    """The result of `found_weight`.

    Fields:
        place: the index of the first program whose micro-batches add up to their batch; None if
            there is none.
        undecided: the indices of later programs whose weights had the same proportions in every
            trial.
        untried: why nothing could be tried, in words; None if something was tried.
        writes_rows: whether the loss changes its rows in place.
    """

    place: int | None
    undecided: frozenset[int] = frozenset()
    untried: str | None = None
    writes_rows: bool = False


def found_weight(
    programs: Sequence[Program],
    batch: ReadBatch,
    cut: Sequence[Microbatch],
    put_back: Callable[[], None],
    dtypes: Iterable[torch.dtype] = (),
) -> FoundWeight:
    """Finds the first program for which the law holds. Each program has another weight.

    During the trials dropout is off, hooks of parameters are not called, and other ranks take no
    part. Afterwards modules, random states and gradients are as before.

    Args:
        programs: programs of one loss, with the likeliest weight first.
        batch: the batch or Window, whose rows are known.
        cut: the micro-batches of the window.
        put_back: restores what the loss changes besides tensors.
        dtypes: dtypes that the loss is known to use, in addition to those that are observed.

    Raises:
        ValueError: the law holds for no program. The text says what is wrong with the first one.
    """
    source = max(batch.given, key=known_rows)
    sizes = [known_rows(piece) for piece in cut]
    trials = [TorchTrial(program, source, sizes, dtypes) for program in programs]
    lacking = programs[0].shares(cut).empty_and_full()
    if lacking is not None and not batch.is_window:
        trials[0].empty, trials[0].full = (rows_of_part(sizes, k) for k in lacking)

    def why(error: Exception) -> str:
        return in_words(error, ERRORS)

    first = programs[0]
    found = first.found
    try:
        with (
            quiet(found),
            hooks_set_aside(found.owner, found.parameters),
            untouched(first) as layers,
        ):
            for layer in layers.layers:
                layer.training = layer.training and not is_not_recurrent(layer)
            chosen = parts(trials[0])
            telling: list[_Pair] = []
            for place, trial in enumerate(trials):
                holds = adds_up(trial, chosen, why)
                if holds is False:
                    continue
                undecided = {
                    later
                    for later in range(place + 1, len(trials))
                    # A sum has another multiple of the gradient, so the trials decided about it.
                    if SUM not in (programs[place].weight, programs[later].weight)
                    and _in_proportion(trial, trials[later], chosen)
                }
                pairs = [
                    pair
                    for later in sorted(undecided)
                    for pair in _telling_apart(trial, trials[later])
                ]
                if not place:
                    telling = pairs
                if holds is True and pairs:
                    tells = adds_up(trial, pairs, why)
                    if tells is False:
                        continue
                    if tells is True:
                        undecided = {
                            later
                            for later in undecided
                            if _in_proportion(trial, trials[later], pairs)
                        }
                untried = holds if isinstance(holds, str) else None
                return FoundWeight(place, frozenset(undecided), untried, trial.seen.writes_rows)
            prove(trials[0], why, more=telling)
            group = trials[0].seen.group
            if group > 1:
                raise ValueError(f"The rows of this loss belong together by {group}.")
    finally:
        put_back()
    return FoundWeight(None)


def _telling_apart(trial: TorchTrial, other: TorchTrial) -> list[_Pair]:
    """A pair of parts in which two weights differ; none if the weights agree in all rows.

    Parts that are chosen by one weight may miss the only row in which the weights differ.
    """
    mine, its = trial.weights_of_rows(), other.weights_of_rows()
    counted = [k for k in range(trial.rows) if mine[k] and its[k]]
    if not counted:
        return []
    least, *_, most = sorted([*counted, *counted[:1]], key=lambda row: mine[row] / its[row])
    if abs(mine[least] * its[most] - mine[most] * its[least]) > 1e-9 * mine[most] * its[least]:
        return [([least], [most])]
    # A row without weight may have no finite loss alone, so another row joins it.
    odd = next((k for k in range(trial.rows) if bool(mine[k]) != bool(its[k])), None)
    return [] if odd is None or len(counted) < 2 else [([odd, counted[0]], [counted[1]])]


def _in_proportion(trial: TorchTrial, other: TorchTrial, chosen: Sequence[_Pair]) -> bool:
    return all(
        abs(mine - its) <= 1e-9
        for a, b in chosen
        for mine, its in zip(trial.weighed(a, b), other.weighed(a, b), strict=True)
    )
