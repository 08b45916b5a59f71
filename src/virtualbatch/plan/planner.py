"""The planning loop: the search asks, a window is measured, and the search gets the answer.

An engine provides the window of each size, with ways to measure its peak and its time.
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
        """The most bytes that runs so far needed, above those held before the window."""

    @property
    def timing(self) -> Timing:
        """The times of this window."""


# All public verbs use this budget.
BUDGET = TimeBudget()


def bytes_allowed(memory_limit: int | str | None, held: int, memory: Memory) -> int:
    """The bytes that a window may take.

    Args:
        memory_limit: bytes, a text, or None.
        held: bytes that are in use before the window. They count towards the limit.
        memory: the engine's view of memory.

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
        held: bytes that are in use before a window. They are added to its peak.
        limit: bytes that a window may take, including `held`.
        errors: the errors that the framework raises when memory runs out.
        remainder: whether a smaller last micro-batch costs nothing; see `Search`.
        trial: microbatch_size -> the timing of its window without any tool that measures peaks;
            None if the timing of `window` needs no such tool.
        tells_peaks: whether there is enough memory to measure peaks; otherwise sizes are only
            tried.
        can_run: whether there is data to run a window on; otherwise nothing is timed.
        budget: how long sizes are compared; None for `BUDGET`.

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
                    # There were more runs, so the peak may be higher.
                    peaks[size] = held + windows[size].peak_bytes()
                    search.tell(Question("memory", size), peaks[size])
        except errors.kinds as error:
            if not (errors.is_possible(error) or errors.is_by_hand(error)):
                raise
            doubt.take(error, size)
            search.tell(question, None)
    return search.plan()


class _Doubt:
    """Decides whether windows failed for lack of memory, if their errors do not say so clearly.

    Args:
        errors: the errors that the framework raises when memory runs out.
    """

    def __init__(self, errors: MemoryErrors):
        self._errors = errors
        self._first: BaseException | None = None
        self._by_hand: list[BaseException] = []
        self._certain = self._at_one_row = False

    def take(self, error: BaseException, size: int) -> None:
        """Takes the error of a window of this size."""
        if self._errors.is_by_hand(error):
            self._by_hand.append(error)
        self._certain = self._certain or self._errors.is_certain(error)
        self._at_one_row = size == 1
        self._first = self._first or error

    def asked(self, search: Search) -> Question | None:
        """The next question of the search.

        Raises:
            ValueError: not even one row fits. If no error clearly meant lack of memory and one row
                failed too, the first error is raised unchanged instead.
            MemoryError: user code raised two such errors. The first is raised unchanged.
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
    """The time left for optional questions, counted from the first of them.

    A new size costs more than its measurements: a program is built and its peak is measured. The
    last new size shows how long that takes. If little more time than that is left, no new size is
    tried. The time is spent on known sizes, because finding the fastest of them is worth more than
    one measurement of another size.
    """

    def __init__(self, budget: TimeBudget):
        self._budget = budget
        self._begin: float | None = None
        self._met: set[int] = set()
        # Start of the last question about a new size; None once the next question has come.
        self._building: float | None = None
        self._cost = 0.0

    def is_over(self, question: Question) -> bool:
        """Whether a question comes too late. Called once for each question, before its answer.

        Args:
            question: the next question.
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
