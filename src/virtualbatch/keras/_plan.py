"""Planning for Keras: a search over sizes, whatever the backend measures with."""

import time
from collections.abc import Callable
from typing import Protocol

from virtualbatch.keras._guard import Memory
from virtualbatch.plan import Plan, parse_limit
from virtualbatch.search import Question, Search

# Seconds after which no further size is timed.
TIME_TO_SPEND = 10.0


class Program(Protocol):
    """The window of one size; neither method changes the model."""

    def peak_bytes(self) -> int:
        """The most bytes that it needs beyond what is held before it."""

    def seconds(self) -> float:
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
    asks = memory_limit is None or "%" in str(memory_limit)
    limit = parse_limit(memory_limit, memory.left_bytes() + held if asks else 0)
    search = Search(rows, limit, remainder=remainder)
    programs: dict[int, Program] = {}
    peaks: dict[int, int] = {}
    begin = time.perf_counter()
    while (question := search.ask()) is not None:
        size = question.microbatch_size
        if question.is_optional and time.perf_counter() - begin > TIME_TO_SPEND:
            search.stop_timing()
            continue
        try:
            if size not in programs:
                programs[size] = program(size)
            if question.kind != "trial" and size not in peaks:
                peaks[size] = held + programs[size].peak_bytes()
                search.tell(Question("memory", size), peaks[size])
            # A size that was only predicted to fit may need a little more.
            if question.kind != "memory" and peaks.get(size, 0) <= limit:
                search.tell(question, programs[size].seconds())
        except memory.kinds as error:
            if not memory.is_out_of_memory(error):
                raise
            search.tell(question, None)
    return search.plan()


def shortest(run: Callable[[], float]) -> float:
    """The shortest of some runs, after one that loads what the first run loads.

    Args:
        run: () -> seconds that it took.
    """
    times: list[float] = []
    # A window of microseconds needs many runs before one of them is undisturbed.
    while len(times) < 2 or sum(times[1:]) < 0.3:
        times.append(run())
    return min(times[1:])
