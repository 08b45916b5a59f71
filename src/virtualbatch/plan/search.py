"""The search for a micro-batch that fits and is fast. It never runs a model itself.

An engine asks the search what to measure, measures it, and reports the result. Above a knee, peak
memory is assumed to grow linearly with the rows of a micro-batch, peak = max(c, a + b * rows). So
two measurements predict every size, and a third one confirms the chosen size. Then a few sizes are
timed, and the fastest of them are timed again. If no peak can be measured, sizes are tried instead,
from the smallest.
"""

import logging
import math
from collections.abc import Container
from typing import Literal, NamedTuple

from virtualbatch.plan.plan import Plan, PlanRow, readable_bytes
from virtualbatch.plan.timing import ALIKE, EARLY, HOPELESS, FastestSize, TimeBudget

_log = logging.getLogger(__name__)

# With less memory than this, peaks are not measured, because the tools for it take too much: the
# fake tensors of PyTorch take 38 MiB, and a graph of TensorFlow needs stacks for its threads.
ROOM_FOR_TOOLS = 64 * 2**20

# Rows of the first micro-batch tried: above the knee of most models, and small enough to fit.
_FIRST = 8
# The most measurements of a peak that does not grow linearly.
_MOST_PEAKS = 8
# If the peak grows by less than this factor, both sizes are below the knee.
_FLAT = 1.02


class Question(NamedTuple):
    """A measurement that the search needs next.

    Fields:
        kind: "memory" for the peak bytes of a window; "time" for the seconds of the whole batch;
            "trial" for the seconds of a size with no known peak, where no tool that measures peaks
            may be loaded.
        microbatch_size: rows of the micro-batches.
    """

    kind: Literal["memory", "time", "trial"]
    microbatch_size: int

    @property
    def is_optional(self) -> bool:
        """Whether a plan is possible without the answer, if time is short."""
        return self.kind == "time" or (self.kind == "trial" and self.microbatch_size > 1)


class Search:
    """Finds the size for one batch, by questions and answers.

    Args:
        rows: rows of the batch, >= 1.
        memory_limit: bytes that a window may take.
        remainder: whether a smaller last micro-batch costs nothing. An engine that compiles a
            program for each shape needs another program, and memory, for the remainder. For such
            an engine the search prefers nearby sizes that divide the batch.
        budget: how often sizes are timed.

    Example:
        >>> search = Search(rows=256, memory_limit=1_000)
        >>> while (question := search.ask()) is not None:
        ...     m = question.microbatch_size
        ...     search.tell(question, 100 + 10 * m if question.kind == "memory" else 1 + 8 / m)
        >>> search.plan().microbatch_size
        86
    """

    def __init__(
        self,
        rows: int,
        memory_limit: int,
        *,
        remainder: bool = True,
        budget: TimeBudget | None = None,
    ):
        self._rows = rows
        self._limit = memory_limit
        self._remainder = remainder
        self._peaks: dict[int, float] = {}
        self._failed: set[int] = set()
        self._rounds = (TimeBudget() if budget is None else budget).rounds
        self._times = FastestSize()
        # The first ends the search for further sizes, the second ends all timing.
        self._no_others = False
        self._stopped = False
        self._trial = False

    def ask(self) -> Question | None:
        """What to measure next; None when nothing more is needed.

        Raises:
            ValueError: not even one row fits.
        """
        if not self._trial and self._has_failed_everywhere():
            self.only_try()
        if self._trial:
            size = self._next_trial()
            return None if size is None else Question("trial", size)
        size = self._next_memory()
        if size is not None:
            return Question("memory", size)
        size = self._next_time()
        return None if size is None else Question("time", size)

    def tell(self, question: Question, answer: float | None) -> None:
        """Takes the answer to a question.

        Args:
            question: a question from `ask`, or a "memory" question about a size whose peak was
                measured again.
            answer: peak bytes or seconds; None if memory ran out.
        """
        size = question.microbatch_size
        _log.debug("%s of micro-batches of %d rows: %s", question.kind, size, answer)
        if answer is None:
            # Memory ran out although the size should fit, so earlier answers about it are wrong.
            self._peaks.pop(size, None)
            self._times.forget(size)
            self._failed.add(size)
        elif question.kind == "memory":
            self._peaks[size] = answer
            if answer > self._limit:
                # A later run needed more memory than the first measurement showed.
                self._times.forget(size)
        else:
            self._times.tell(size, answer)

    def only_try(self) -> None:
        """Stops asking for peaks, because measuring them needs more memory than is left."""
        _log.warning(
            "Too little memory is left to measure peaks: sizes are tried from the smallest, and "
            "the limit of %s is not checked.",
            readable_bytes(self._limit),
        )
        self._trial = True
        # The failures so far may come from the measuring tool alone.
        self._failed = set()

    def skip(self, question: Question) -> None:
        """Leaves a question about times unanswered, because no time is left or there is no data.

        If the question is about a new size and other sizes were timed, no further new size is
        asked for, but the timed ones may be timed again. Otherwise all timing ends.

        Args:
            question: a question from `ask`.
        """
        timed = self._times.seconds()
        if question.kind == "time" and timed and question.microbatch_size not in timed:
            self._no_others = True
        else:
            self._stopped = True

    def plan(self) -> Plan:
        """The plan. Call it after `ask` has returned None."""
        seconds = self._times.seconds()
        largest = max(seconds) if self._trial else self._largest_fitting()
        # If time allowed for one size only, it cannot be called fast.
        if largest in seconds or len(seconds) > 1:
            size, fastest = self._times.chosen()
            reason = (
                f"{largest} rows fit at once; {size} is the smallest size measured "
                f"within {ALIKE:.0%} of the fastest, {fastest}."
                if size != fastest
                else f"{largest} rows fit at once; {size} is the fastest size measured."
            )
            if self._trial:
                reason += " Sizes were tried, because too little memory was left to measure peaks."
        else:
            size = largest
            timed = "times were not compared" if seconds else "none was timed"
            reason = f"{largest} is the largest size that fits; {timed}."
        tried = sorted({*self._peaks, *seconds})
        rows = [PlanRow(m, self._peak(m), m in self._peaks, seconds.get(m)) for m in tried]
        return Plan(size, -(-self._rows // size), self._limit, reason, tuple(rows))

    def _smallest_failing(self) -> int:
        """The smallest size known not to fit; the rows of the batch plus 1 if all may fit."""
        failing = [size for size, peak in self._peaks.items() if peak > self._limit]
        return min([*failing, *self._failed, self._rows + 1])

    def _largest_fitting(self) -> int:
        """The largest size known to fit: the whole batch, or a size below all that do not fit.

        0 if no size is known to fit.
        """
        # The uncut batch needs no buffer for the sum of gradients, so it may fit where small sizes
        # do not.
        if self._rows not in self._failed and self._peaks.get(self._rows, math.inf) <= self._limit:
            return self._rows
        ceiling = self._smallest_failing()
        return max((size for size in self._peaks if size < ceiling), default=0)

    def _peak(self, size: int) -> int | None:
        """The measured or predicted peak; None if no peak is known."""
        return math.ceil(self.predicted(size)) if self._peaks else None

    def predicted(self, size: int) -> float:
        """The peak of a size in bytes, measured or predicted.

        Between two measured sizes the prediction is linear. Beyond them it follows the line through
        the largest sizes. It is never below the smallest peak.

        Args:
            size: rows of a micro-batch. At least one peak must be measured.
        """
        if size in self._peaks:
            return self._peaks[size]
        below = max((m for m in self._peaks if m < size), default=None)
        above = min((m for m in self._peaks if m > size), default=None)
        if below is not None and above is not None:
            part = (size - below) / (above - below)
            return self._peaks[below] + part * (self._peaks[above] - self._peaks[below])
        line = self._line()
        smallest = min(self._peaks.values())
        return smallest if line is None else max(smallest, line[0] + line[1] * size)

    def _line(self) -> tuple[float, float] | None:
        """(a, b) of peak = a + b * rows through the largest size and one far enough below it."""
        for high in sorted(self._peaks, reverse=True):
            for low in sorted(self._peaks, reverse=True):
                # A small step would magnify errors of measurement.
                if 3 * low <= 2 * high and self._peaks[high] > _FLAT * self._peaks[low]:
                    slope = (self._peaks[high] - self._peaks[low]) / (high - low)
                    return self._peaks[low] - slope * low, slope
        return None

    def _next_memory(self) -> int | None:
        floor, ceiling = self._largest_fitting(), self._smallest_failing()
        if floor == self._rows:
            return None
        if ceiling == 1:
            if self._rows in self._peaks or self._rows in self._failed:
                raise ValueError(self._nothing_fits())
            return self._rows
        if floor == 0:
            # A quarter of the size that did not fit.
            return self._cut(_FIRST if ceiling > self._rows else max(1, ceiling // 4))
        if floor + 1 >= ceiling or len(self._peaks) + len(self._failed) >= _MOST_PEAKS:
            return None
        line = self._line()
        # Below the knee the peak does not depend on the rows.
        predicted = self._rows if line is None else int((self._limit - line[0]) / line[1])
        wanted = min(predicted, self._rows)
        if wanted >= ceiling:
            # A size at or above this one did not fit, so the prediction was wrong.
            wanted = (floor + ceiling) // 2
        elif line is None or len(self._peaks) < 2:
            # Small sizes may be far from the line, so go at most four times further.
            wanted = min(4 * floor, wanted)
        if wanted > floor:
            wanted = self._cut(wanted)
        # A gain of 2% in rows is not worth a measurement.
        return wanted if wanted > 1.02 * floor else None

    def _cut(self, size: int) -> int:
        """The smallest size that gives as many micro-batches as `size`.

        If a remainder costs something, a size that divides the batch is preferred, down to half of
        that.
        """
        size = -(-self._rows // -(-self._rows // size))
        if self._remainder:
            return size
        whole = next(m for m in range(size, 0, -1) if self._rows % m == 0)
        return whole if 2 * whole >= size else size

    def _has_failed_everywhere(self) -> bool:
        """Whether memory ran out at every size, so that the measuring tool may be the reason."""
        return not self._peaks and {1, self._rows} <= self._failed

    def _next_trial(self) -> int | None:
        tried = self._times.seconds()
        if 1 in self._failed or (self._stopped and not tried):
            raise ValueError(self._nothing_fits())
        if not tried:
            return 1
        largest = max(tried)
        hopeless = tried[largest] > HOPELESS * min(tried.values())
        if self._stopped or self._failed or hopeless or largest == self._rows:
            return None
        return min(2 * largest, self._rows)

    def _next_time(self) -> int | None:
        if self._stopped:
            return None
        timed = self._times.seconds()
        # Small sizes come first.
        for size in self._far_apart():
            if size not in timed and not self._no_others:
                return size
        if not timed:
            return None
        if (again := self._times.next_measurement(min(EARLY, self._rounds))) is not None:
            return again
        other = None if self._no_others else self._further(timed)
        return self._times.next_measurement(self._rounds) if other is None else other

    def _further(self, timed: Container[int]) -> int | None:
        """A size next to the fastest that was not timed yet; None if there is none."""
        smallest, fastest = self._times.chosen()
        largest = self._largest_fitting()
        # Larger first: a size between two timed ones is seldom much slower than both.
        above = 2 * fastest if 3 * fastest <= largest else largest
        for size in (above, smallest // 2):
            if size >= 1 and (cut := self._cut(size)) not in timed and self._may_fit(cut):
                return cut
        return None

    def _far_apart(self) -> list[int]:
        """Sizes whose peaks are known and fit, at least a factor two apart, smallest first."""
        found: list[int] = []
        for size in sorted(self._peaks, reverse=True):
            if self._may_fit(size) and (not found or 2 * size <= found[-1]):
                found.append(size)
        return found[::-1]

    def _may_fit(self, size: int) -> bool:
        if size == self._rows:
            return self._largest_fitting() == size
        return size < self._smallest_failing()

    def _nothing_fits(self) -> str:
        limit = readable_bytes(self._limit)
        needed = self._peaks.get(1)
        got = "ran out of memory" if needed is None else f"needs {readable_bytes(needed)}"
        return (
            "memory_limit must hold a micro-batch of one row, with parameters, optimizer state and "
            f"the accumulation buffer. Got a limit of {limit}, and one row {got}. "
            "Raise the limit, or make the model or its rows smaller."
        )
