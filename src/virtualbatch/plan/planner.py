"""The one loop that plans: the search asks, windows are measured, the search is told.

What an engine brings is the window of a size: how to measure its peak and its time.
"""

import time
from collections.abc import Callable
from typing import Protocol

from virtualbatch.plan.out_of_memory import MemoryErrors
from virtualbatch.plan.plan import Plan, parse_limit
from virtualbatch.plan.retry import Memory
from virtualbatch.plan.search import Question, Search
from virtualbatch.plan.timing import TimeBudget, Timing


class Window(Protocol):
    """The window of one size; neither method changes the model."""

    def peak_bytes(self) -> int:
        """The most bytes that it needs beyond what is held before it, as far as is known now."""

    @property
    def timing(self) -> Timing:
        """How long it takes."""


# Of the public verbs, which do not take another.
BUDGET = TimeBudget()


def bytes_allowed(memory_limit: int | str | None, held: int, memory: Memory) -> int:
    """The bytes that a window may take.

    Args:
        memory_limit: bytes, a text, or None.
        held: bytes of what exists before the window, which are a part of it.
        memory: what the engine knows of memory.

    Raises:
        ValueError: the limit does not parse.
    """
    left = memory.left_bytes()
    return parse_limit(memory_limit, None if left is None else left + held)


def planned(
    window: Callable[[int], Window],
    rows: int,
    held: int,
    limit: int,
    errors: MemoryErrors,
    *,
    remainder: bool,
    trial: Callable[[int], Timing] | None = None,
    tells_peaks: bool = True,
    can_run: bool = True,
    budget: TimeBudget | None = None,
) -> Plan:
    """The plan for a batch.

    Args:
        window: microbatch_size -> its window.
        rows: rows of the batch.
        held: bytes of what exists before a window, on top of which it has its peak.
        limit: bytes that a window may take with them.
        errors: by which the framework says that memory ran out.
        remainder: whether micro-batches that differ cost nothing; see `Search`.
        trial: microbatch_size -> the time of its window where nothing is to be loaded that tells
            its peak; None where that of `window` is the same.
        tells_peaks: whether there is room for what tells peaks; else sizes are only tried.
        can_run: whether there is data to run a window on; else nothing is timed.
        budget: how long sizes are compared for; None for `BUDGET`.

    Raises:
        ValueError: not even one row fits.
    """
    budget = BUDGET if budget is None else budget
    search = Search(rows, limit, remainder=remainder, budget=budget)
    if not tells_peaks:
        search.only_try()
    windows: dict[int, Window] = {}
    peaks: dict[int, int] = {}
    clock = _Clock(budget)
    doubt = _Doubt(errors)
    while (question := doubt.asked(search)) is not None:
        size = question.microbatch_size
        if clock.is_over(question) or (question.kind != "memory" and not can_run):
            search.skip(question)
            continue
        try:
            if question.kind == "trial" and trial is not None:
                search.tell(question, trial(size).seconds())
                continue
            if size not in windows:
                windows[size] = window(size)
            if question.kind != "trial" and size not in peaks:
                peaks[size] = held + windows[size].peak_bytes()
                search.tell(Question("memory", size), peaks[size])
            # A size that was only predicted to fit may need a little more.
            if question.kind != "memory" and peaks.get(size, 0) <= limit:
                search.tell(question, windows[size].timing.seconds())
                if size in peaks:
                    # Of more runs, so it may have grown.
                    peaks[size] = held + windows[size].peak_bytes()
                    search.tell(Question("memory", size), peaks[size])
        except errors.kinds as error:
            if not (errors.is_possible(error) or errors.is_by_hand(error)):
                raise
            doubt.take(error, size)
            search.tell(question, None)
    return search.plan()


class _Doubt:
    """Whether memory is why windows failed, where their errors only may mean that.

    Args:
        errors: by which the framework says that memory ran out.
    """

    def __init__(self, errors: MemoryErrors):
        self._errors = errors
        self._first: BaseException | None = None
        self._by_hand: list[BaseException] = []
        self._certain = self._at_one_row = False

    def take(self, error: BaseException, size: int) -> None:
        """Takes an error of the window of a size."""
        if self._errors.is_by_hand(error):
            self._by_hand.append(error)
        self._certain = self._certain or self._errors.is_certain(error)
        self._at_one_row = size == 1
        self._first = self._first or error

    def asked(self, search: Search) -> Question | None:
        """What the search asks next.

        Raises:
            ValueError: not even one row fits. In its place the first error is raised unchanged, if
                none was certain and the same came with one row.
            MemoryError: two were raised by hand; the first of them is raised unchanged.
        """
        if len(self._by_hand) > 1:
            raise self._by_hand[0]
        try:
            return search.ask()
        except ValueError:
            if self._first is None or self._certain or not self._at_one_row:
                raise
            first = self._first
        raise first


class _Clock:
    """The time for questions that can be left unanswered, counted from the first of them.

    A size that was not met yet takes more than its measurements: a program is built and its peak
    is measured. What that takes is known from the last such size. Where little more than that is
    left, what is left goes to the sizes that are there: to know which of them is the fastest is
    worth more than one measurement of another.
    """

    def __init__(self, budget: TimeBudget):
        self._budget = budget
        self._begin: float | None = None
        self._met: set[int] = set()
        # When the last question about a size that was not met before began, until the next one.
        self._building: float | None = None
        self._cost = 0.0

    def is_over(self, question: Question) -> bool:
        """Whether a question comes too late. Called once for each question, before it is answered.

        Args:
            question: the next one.
        """
        now = time.perf_counter()
        if self._building is not None:
            self._cost, self._building = now - self._building, None
        new = question.microbatch_size not in self._met
        if question.is_optional:
            if self._begin is None:
                self._begin = now
            # Nothing is built for a trial.
            needed = self._cost + self._budget.reserve if new and question.kind == "time" else 0.0
            spent = now - self._begin
            if spent >= self._budget.seconds or spent + needed > self._budget.seconds:
                return True
        if new:
            self._met.add(question.microbatch_size)
            self._building = now
        return False
