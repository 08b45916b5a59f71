"""Which size is the fastest, though times are disturbed."""

import random

import pytest

from virtualbatch.race import Race


def run(race, seconds, disturbed=lambda size: 1.0):
    """Has every size timed as often as the race asks; returns the sizes in this order."""
    asked = list(seconds)
    for size in seconds:
        race.tell(size, seconds[size] * disturbed(size))
    while (size := race.next_look(9)) is not None:
        asked.append(size)
        race.tell(size, seconds[size] * disturbed(size))
        assert len(asked) <= 9 * len(seconds)
    return asked


def test_those_near_the_fastest_are_timed_in_turns():
    race = Race()
    asked = run(race, {2: 1.4, 4: 1.2, 8: 1.1, 16: 1.0})
    # A look for all, two more for those within 30 %, and six for those within 15 %.
    assert asked == [2, 4, 8, 16, *[4, 8, 16] * 2, *[8, 16] * 6]
    assert race.near() == [8, 16]


def test_one_that_is_far_ahead_is_timed_once():
    race = Race()
    assert run(race, {2: 2.0, 4: 1.0}) == [2, 4]
    assert race.seconds() == {2: 2.0, 4: 1.0}


def test_a_disturbance_does_not_decide():
    # The first look at the fastest took a quarter longer.
    looks = []

    def disturbed(size):
        looks.append(size)
        return 1.25 if size == 16 and looks.count(16) == 1 else 1.0

    race = Race()
    run(race, {4: 1.2, 8: 1.1, 16: 1.0}, disturbed)
    found = race.seconds()
    assert min(found, key=found.get) == 16


def test_a_size_that_ran_in_slow_turns_only_is_not_thought_slow():
    race = Race()
    # 4 rows took 1.0 and then, as in those turns everything, 1.5.
    for size, seconds in ((4, 1.0), (4, 1.0), (4, 1.5), (8, 1.35), (4, 1.5), (8, 1.35)):
        race.tell(size, seconds)
    found = race.seconds()
    assert found[8] / found[4] == pytest.approx(0.9)
    assert found[4] == pytest.approx(1.25)


def test_of_a_turn_only_those_that_have_not_run_are_next():
    race = Race()
    for size in (4, 8, 4, 16, 8):
        race.tell(size, 1.0)
    assert race.next_look(9) == 4
    race.tell(4, 1.0)
    assert race.next_look(9) == 8


def test_a_few_looks_are_enough_if_no_more_are_wanted():
    race = Race()
    for _ in range(3):
        for size in (4, 8):
            race.tell(size, 1.0)
    assert race.next_look(3) is None
    assert race.next_look(4) == 4


def test_what_does_not_fit_leaves_the_race():
    race = Race()
    run(race, {4: 1.1, 8: 1.0})
    race.forget(8)
    assert race.near() == [4]
    assert race.next_look(9) is None


def test_nothing_to_time_is_no_race():
    race = Race()
    assert (race.near(), race.seconds(), race.next_look(9)) == ([], {}, None)


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_fifteen_percent_costs_less_than_five(seed):
    noise = random.Random(seed)
    sizes = {8: 1.3, 16: 1.1, 32: 1.02, 64: 1.0, 128: 1.08}
    race, spell = Race(), [1.0]

    def disturbed(size):
        # Slow spells that pass, and jitter of each look.
        spell[0] = 0.7 * spell[0] + 0.3 * noise.uniform(0.75, 1.45)
        return spell[0] * noise.uniform(0.95, 1.05)

    run(race, sizes, disturbed)
    found = race.seconds()
    assert sizes[min(found, key=found.get)] <= 1.05
