"""Planning for Keras: a search over sizes, whatever the backend measures with."""

from collections.abc import Callable
from typing import Protocol

from virtualbatch.plan.patience import TimeBudget
from virtualbatch.plan.plan import Plan, parse_limit
from virtualbatch.plan.retry import Memory
from virtualbatch.plan.search import Question, Search
from virtualbatch.plan.timing import Timing


class Program(Protocol):
    """The window of one size; neither method changes the model."""

    def peak_bytes(self) -> int:
        """The most bytes that it needs beyond what is held before it, as far as is known now."""

    @property
    def timing(self) -> Timing:
        """How long it takes."""


def searched(
    program: Callable[[int], Program],
    rows: int,
    held: int,
    memory: Memory,
    memory_limit: int | str | None,
    remainder: bool,
) -> Plan:
    """The plan for a batch.

    Args:
        program: microbatch_size -> its program.
        rows: rows of the batch.
        held: bytes of weights, optimizer, metrics and the batch.
        memory: what the backend knows of memory.
        memory_limit: bytes, a text, or None.
        remainder: whether micro-batches that differ cost nothing; see `Search`.

    Raises:
        ValueError: not even one row fits, or a limit does not parse.
    """
    left = memory.left_bytes()
    limit = parse_limit(memory_limit, None if left is None else left + held)
    search = Search(rows, limit, remainder=remainder)
    programs: dict[int, Program] = {}
    peaks: dict[int, int] = {}
    patience = TimeBudget()
    while (question := search.ask()) is not None:
        size = question.microbatch_size
        if patience.is_over(question):
            search.skip(question)
            continue
        try:
            if size not in programs:
                programs[size] = program(size)
            if question.kind != "trial" and size not in peaks:
                peaks[size] = held + programs[size].peak_bytes()
                search.tell(Question("memory", size), peaks[size])
            # A size that was only predicted to fit may need a little more.
            if question.kind != "memory" and peaks.get(size, 0) <= limit:
                search.tell(question, programs[size].timing.seconds())
                if size in peaks:
                    # Of more runs, so it may have grown.
                    peaks[size] = held + programs[size].peak_bytes()
                    search.tell(Question("memory", size), peaks[size])
        except memory.errors.kinds as error:
            if not memory.errors.is_possible(error):
                raise
            search.tell(question, None)
    return search.plan()
