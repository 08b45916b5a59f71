"""How long a plan goes on: seconds for the questions that it can do without.

A size that was not met yet takes more than its looks: a program is built and its peak is measured.
What that takes is known from the last such size. Where little more than that is left, what is left
goes to the sizes that are there: to know which of them is the fastest is worth more than one look
at another.
"""

import time

from virtualbatch.plan.search import Question

# Seconds after which nothing is timed any more. Where a window takes a second that is one look or
# two at each size; what they cannot tell apart is in docs/plan.md.
TIME_TO_SPEND = 10.0
# Of them, seconds that have to be left for looks once a size is there that was not met before.
_FOR_LOOKS = 2.0


class TimeBudget:
    """The time for questions that can be left unanswered, counted from the first of them."""

    def __init__(self) -> None:
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
            needed = self._cost + _FOR_LOOKS if new and question.kind == "time" else 0.0
            if now - self._begin + needed > TIME_TO_SPEND:
                return True
        if new:
            self._met.add(question.microbatch_size)
            self._building = now
        return False
