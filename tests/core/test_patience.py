"""The time of a plan, and what of it a size that was not met yet would take."""

import pytest

from virtualbatch.plan.patience import TIME_TO_SPEND, TimeBudget
from virtualbatch.plan.search import Question


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr("virtualbatch.plan.patience.time.perf_counter", found)
    return found


def answered(patience, clock, question, seconds):
    """Answers a question that is not too late."""
    assert not patience.is_over(question)
    clock.now += seconds


def test_time_is_counted_from_the_first_question_that_can_be_left(clock):
    patience = TimeBudget()
    answered(patience, clock, Question("memory", 8), 100.0)
    answered(patience, clock, Question("time", 8), TIME_TO_SPEND + 1)
    assert patience.is_over(Question("time", 8))
    assert not patience.is_over(Question("memory", 8))


@pytest.mark.parametrize("seconds", [1.0, 6.0])
def test_a_size_that_was_not_met_has_to_leave_time_for_looks(clock, seconds):
    patience = TimeBudget()
    answered(patience, clock, Question("memory", 8), 99.0)
    # The last one counts, not the first, which loads what all need.
    answered(patience, clock, Question("memory", 32), seconds)
    answered(patience, clock, Question("time", 8), 1.0)
    answered(patience, clock, Question("time", 32), 1.0)
    answered(patience, clock, Question("time", 16), seconds)
    assert patience.is_over(Question("time", 64)) == (seconds > 3.0)
    assert not patience.is_over(Question("time", 16))


def test_what_looks_take_is_not_taken_for_what_building_takes(clock):
    patience = TimeBudget()
    answered(patience, clock, Question("memory", 8), 0.1)
    answered(patience, clock, Question("time", 8), 7.0)
    assert not patience.is_over(Question("time", 16))


def test_nothing_is_built_for_a_trial(clock):
    patience = TimeBudget()
    answered(patience, clock, Question("trial", 1), 1.0)
    answered(patience, clock, Question("trial", 2), 5.0)
    answered(patience, clock, Question("trial", 4), 4.5)
    assert not patience.is_over(Question("trial", 8))
