"""The loop that plans: its time, what it asks again, and errors that only may mean memory."""

import pytest

from virtualbatch.plan.out_of_memory import MemoryErrors, any_of
from virtualbatch.plan.planner import _Clock, planned
from virtualbatch.plan.search import Question
from virtualbatch.plan.timing import TimeBudget, Timing

BUDGET = TimeBudget()


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr("virtualbatch.plan.planner.time.perf_counter", found)
    return found


def answered(budget, clock, question, seconds):
    """Answers a question that is not too late."""
    assert not budget.is_over(question)
    clock.now += seconds


def test_time_is_counted_from_the_first_question_that_can_be_left(clock):
    budget = _Clock(BUDGET)
    answered(budget, clock, Question("memory", 8), 100.0)
    answered(budget, clock, Question("time", 8), BUDGET.seconds + 1)
    assert budget.is_over(Question("time", 8))
    assert not budget.is_over(Question("memory", 8))


@pytest.mark.parametrize("seconds", [1.0, 6.0])
def test_a_size_that_was_not_met_has_to_leave_time_for_looks(clock, seconds):
    budget = _Clock(BUDGET)
    answered(budget, clock, Question("memory", 8), 99.0)
    # The last one counts, not the first, which loads what all need.
    answered(budget, clock, Question("memory", 32), seconds)
    answered(budget, clock, Question("time", 8), 1.0)
    answered(budget, clock, Question("time", 32), 1.0)
    answered(budget, clock, Question("time", 16), seconds)
    assert budget.is_over(Question("time", 64)) == (seconds > 3.0)
    assert not budget.is_over(Question("time", 16))


def test_what_looks_take_is_not_taken_for_what_building_takes(clock):
    budget = _Clock(BUDGET)
    answered(budget, clock, Question("memory", 8), 0.1)
    answered(budget, clock, Question("time", 8), 7.0)
    assert not budget.is_over(Question("time", 16))


def test_nothing_is_built_for_a_trial(clock):
    budget = _Clock(BUDGET)
    answered(budget, clock, Question("trial", 1), 1.0)
    answered(budget, clock, Question("trial", 2), 5.0)
    answered(budget, clock, Question("trial", 4), 4.5)
    assert not budget.is_over(Question("trial", 8))


ERRORS = MemoryErrors((), (RuntimeError, MemoryError), any_of("no memory"), any_of("no handle"))
# Sizes are measured once each, and nothing waits.
QUICK = TimeBudget(rounds=1)


class Window:
    """A window that needs 10 bytes a row and takes a moment; it raises where it is told to."""

    def __init__(self, size, fails=lambda size: None, grows=False, error=RuntimeError):
        self.size, self.fails, self.grows, self.runs = size, fails, grows, 0
        self.error = error
        self.timing = Timing(self.run)

    def run(self):
        if (text := self.fails(self.size)) is not None:
            raise self.error(text)
        self.runs += 1
        return 1.0 + 1.0 / self.size

    def peak_bytes(self):
        if (text := self.fails(self.size)) is not None:
            raise self.error(text)
        return 10 * self.size + (self.runs if self.grows else 0)


def planned_for(limit=10_000, fails=lambda size: None, grows=False, error=RuntimeError, **options):
    made = []

    def window(size):
        made.append(Window(size, fails, grows, error))
        return made[-1]

    options = {"remainder": True, "budget": QUICK} | options
    return planned(window, 64, 100, limit, ERRORS, **options), made


def test_a_peak_is_on_top_of_what_is_held_and_a_size_is_made_once():
    plan, made = planned_for()
    assert {row.microbatch_size: row.peak_bytes for row in plan.rows}[8] == 180
    assert len({window.size for window in made}) == len(made)


def test_a_peak_that_grew_is_told_again():
    plan, _ = planned_for(grows=True)
    assert {row.microbatch_size: row.peak_bytes for row in plan.rows}[8] > 180


def test_without_time_nothing_is_timed():
    plan, made = planned_for(budget=TimeBudget(seconds=0))
    assert plan.reason == "64 is the largest size that fits; none was timed."
    assert all(window.runs == 0 for window in made)


def test_without_data_nothing_runs():
    plan, made = planned_for(limit=500, can_run=False)
    assert plan.microbatch_size < 64
    assert all(window.runs == 0 for window in made)


def test_where_nothing_tells_peaks_sizes_are_tried():
    tried = []

    def trial(size):
        tried.append(size)
        return Window(size).timing

    plan, made = planned_for(tells_peaks=False, trial=trial)
    assert made == []
    assert tried == [row.microbatch_size for row in plan.rows] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("text", ["no memory", "no handle"])
def test_a_size_that_may_have_run_out_does_not_fit(text):
    plan, _ = planned_for(fails=lambda size: text if size > 16 else None)
    assert plan.microbatch_size <= 16


def test_an_ambiguous_error_of_every_size_comes_out_as_it_was():
    with pytest.raises(RuntimeError, match="no handle with 8 rows"):
        planned_for(fails=lambda size: f"no handle with {size} rows")


def test_a_certain_error_of_one_row_is_that_nothing_fits():
    with pytest.raises(ValueError, match="one row ran out of memory"):
        planned_for(fails=lambda size: "no handle" if size > 1 else "no memory")


def test_a_memory_error_raised_by_hand_is_met_twice_at_most():
    sizes = []

    def fails(size):
        sizes.append(size)
        return f"my pool is empty with {size} rows"

    with pytest.raises(MemoryError) as raised:
        planned_for(fails=fails, error=MemoryError)
    assert str(raised.value) == f"my pool is empty with {sizes[0]} rows"
    assert raised.value.__context__ is raised.value.__cause__ is None
    assert len(sizes) == 2


def test_another_error_is_raised_at_once():
    with pytest.raises(RuntimeError, match="no such thing"):
        planned_for(fails=lambda size: "no such thing")
