"""The time of a window, by runs of known length."""

import pytest

from virtualbatch.plan.timing import ENOUGH, Timing


def timing(seconds, load=None):
    left = iter(seconds)
    return Timing(lambda: next(left), load)


def test_the_first_run_does_not_count():
    assert timing([0.01, 5.0]).seconds() == 5.0


def test_short_runs_are_repeated_until_one_of_them_tells():
    runs = []

    def run():
        runs.append(None)
        return ENOUGH / 4

    assert Timing(run).seconds() == ENOUGH / 4
    assert len(runs) == 1 + 4


def test_the_mean_counts():
    # The shortest of two would beat the one run that a slightly longer window gets.
    assert timing([1.0, 0.06, 0.03, 0.05, 1.0]).seconds() == pytest.approx(0.14 / 3)


def test_runs_that_were_made_for_something_else_count_once():
    found = timing([1.0, 0.2, 0.3])
    found.run()
    found.run()
    assert found.seconds() == 0.2
    assert found.seconds() == 0.3


def test_what_loads_takes_the_place_of_the_first_run():
    loads = []
    found = timing([0.2, 0.3], lambda: loads.append(None))
    assert [found.seconds(), found.seconds()] == [0.2, 0.3]
    assert len(loads) == 1


def test_an_error_while_loading_comes_again():
    def load():
        raise MemoryError

    found = timing([0.2], load)
    for _ in range(2):
        with pytest.raises(MemoryError):
            found.seconds()
