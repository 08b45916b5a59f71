"""Finds the weight of a trainer's loss among candidates, on its first window, with all ranks."""

import logging
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import distributed

from virtualbatch.certify.first_window import NO_GRADIENT
from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._certify.found_weight import FoundWeight, found_weight
from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._window import Program
from virtualbatch.transformers._weights import Candidate
from virtualbatch.window.terms import SUM

_log = logging.getLogger("virtualbatch")

Told = TypeVar("Told")

# Windows that are tried again, because the rows of the first may be too much alike, such as all of
# one class.
_AGAIN = (8, 64, 512)

# Shares that differ by less than this count as equal.
_ALIKE = 1e-9

# Transformers and TRL compute norms and losses in float32, in float64 models too.
_COMPUTED_IN = (torch.float32,)


class WeightFinder:
    """Finds what a loss was divided by, and tries again while the answer is open.

    While several candidates give the same shares, any of them is right. The first window in which
    they differ decides. Rows without a gradient decide nothing, so the next window is tried. A few
    later windows are tried again too.

    Args:
        names: the names of the trainer and its model, for errors.
        ranks: the number of ranks that train together.
    """

    def __init__(self, names: tuple[str, str], ranks: int):
        self._names = names
        self._ranks = ranks
        self._first = 0
        self._undecided: frozenset[int] = frozenset()
        self._is_found = False
        self._has_warned = False
        self._has_given_up = False
        self._windows = 0
        self.writes_rows = False

    def begin(self) -> None:
        """Counts a window. A few windows are tried even if the weight seems to be known."""
        self._windows += 1
        if self._windows in _AGAIN and not self._has_given_up:
            self._is_found = False

    @property
    def is_decided(self) -> bool:
        """Whether the weight is known, so that nothing more is tried."""
        return self._is_found and not self._undecided

    def choose(
        self,
        candidates: Sequence[Candidate],
        program_of: Callable[[Candidate], Program],
        batch: ReadBatch,
        cut: Sequence[Microbatch],
        put_back: Callable[[], None],
    ) -> Candidate | None:
        """The candidate that is right for a window; None if it is unknown and cannot be tried now.

        Args:
            candidates: the candidates, the likeliest first. They are the same in all windows.
            program_of: candidate -> a program with the loss of a micro-batch and this weight.
            batch: the window.
            cut: its micro-batches; empty if the window has no known rows.
            put_back: puts back what the loss changes beside tensors.

        Raises:
            ValueError: no candidate is right.
        """
        programs = [program_of(each) for each in candidates]
        if self.is_decided:
            return candidates[self._first]
        is_open = not self._is_found or any(
            bool(cut) and _differ(programs[self._first], programs[index], cut)
            for index in self._undecided
        )
        told = self._told((is_open, bool(cut)))
        if not any(is_open for is_open, _ in told):
            return candidates[self._first]
        if not all(can_try for _, can_try in told):
            return candidates[self._first] if self._is_found else None
        while True:
            found, error = self._tried(programs, batch, cut, put_back)
            firsts, errors = zip(*self._told((found.place, error)), strict=True)
            for each in errors:
                if each is not None:
                    raise ValueError(self._refusal(each))
            last = max(firsts)
            is_same = all(index == last for index in firsts)
            self._first = last
            if is_same:
                break
        several = self._told((found.undecided, found.writes_rows, found.untried))
        self.writes_rows = any(writes for _, writes, _ in several)
        if not all(untried == NO_GRADIENT for _, _, untried in several):
            self._is_found = True
            self._undecided = frozenset().union(*(undecided for undecided, _, _ in several))
        self._tell(candidates[self._first], found.untried)
        return candidates[self._first]

    def _tell(self, chosen: Candidate, untried: str | None) -> None:
        if untried is None:
            _log.info("The loss of %s is divided by: %s.", self._names[0], chosen.name)
        elif not self._has_warned:
            self._has_warned = True
            _log.warning(
                "The divisor of the loss of %s could not be checked (%s), so it is assumed to be "
                "%s. %s",
                self._names[0],
                untried,
                chosen.name,
                "Later rows will be checked."
                if untried == NO_GRADIENT
                else "Pass weight= to set it.",
            )

    def give_up(self) -> None:
        """Stops the search. From now on the first candidate is used."""
        self._first, self._undecided, self._is_found = 0, frozenset(), True
        self._has_given_up = True

    def _tried(
        self,
        programs: Sequence[Program],
        batch: ReadBatch,
        cut: Sequence[Microbatch],
        put_back: Callable[[], None],
    ) -> tuple[FoundWeight, str | None]:
        first = self._first
        try:
            found = found_weight(programs[first:], batch, cut, put_back, _COMPUTED_IN)
        except ValueError as error:
            if self._ranks == 1:
                raise ValueError(self._refusal(str(error))) from error
            return FoundWeight(first), str(error)
        if found.place is None:
            # The certificate found only rounding, so the first candidate may stay.
            return FoundWeight(first), None
        index = found.place + first
        return found._replace(
            place=index, undecided=frozenset(each + first for each in found.undecided)
        ), None

    def _refusal(self, error: str) -> str:
        trainer, model = self._names
        return (
            "A loss must be one mean or sum over rows or over labels that count, or weight must "
            f"return what it was divided by. Got the loss of {trainer} on {model}, which is "
            "neither on a few rows of its first window. Pass weight=lambda inputs: ..., for class "
            'weights their sum over inputs["labels"]. If rows see each other in the loss, or it '
            f"is a sum of two means, it cannot be cut: train it uncut. In detail: {error}"
        )

    def _told(self, mine: Told) -> list[Told]:
        """The answers of all ranks."""
        if self._ranks == 1:
            return [mine]
        found: list[Any] = [None] * self._ranks
        distributed.all_gather_object(found, mine)
        return found


def unlike(programs: Sequence[Program], cut: Sequence[Microbatch]) -> list[int]:
    """The micro-batches of a window in which weights differ most, two for each pair of weights.

    Args:
        programs: one program for each weight.
        cut: the micro-batches.

    Returns:
        The numbers of these micro-batches; empty if all weights give the same shares.
    """
    shares = [
        [float(share) for share in program.shares(cut).of_rows_or_term()]
        for program in programs
        if program.weight != SUM
    ]
    found: dict[int, None] = {}
    for mine, its in combinations(shares, 2):
        apart = [a - b for a, b in zip(mine, its, strict=True)]
        if max(map(abs, apart)) > _ALIKE:
            found |= dict.fromkeys((apart.index(min(apart)), apart.index(max(apart))))
    return list(found)


def _differ(program: Program, other: Program, cut: Sequence[Microbatch]) -> bool:
    """Whether two weights give the micro-batches of a window different shares."""
    if SUM in (program.weight, other.weight):
        return True
    pairs = zip(
        program.shares(cut).of_rows_or_term(), other.shares(cut).of_rows_or_term(), strict=True
    )
    return any(abs(mine - its) > _ALIKE for mine, its in pairs)
