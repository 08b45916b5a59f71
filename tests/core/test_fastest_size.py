"""Which size is the fastest, though times are disturbed."""

import random

import pytest

from virtualbatch.plan.timing import EARLY, FastestSize

ROUNDS = 9


def run(times, seconds, disturbed=lambda size: 1.0):
    """Has every size timed as often as the times ask; returns the sizes in this order."""
    asked = list(seconds)
    for size in seconds:
        times.tell(size, seconds[size] * disturbed(size))
    while (size := times.next_measurement(ROUNDS)) is not None:
        asked.append(size)
        times.tell(size, seconds[size] * disturbed(size))
        assert len(asked) <= ROUNDS * len(seconds)
    return asked


def test_sizes_are_timed_in_rounds_and_slow_ones_are_left():
    times = FastestSize()
    asked = run(times, {2: 1.6, 4: 1.2, 8: 1.01, 16: 1.0})
    assert asked == [2, 4, 8, 16] * EARLY + [4, 8, 16] * (ROUNDS - EARLY)


def test_one_that_is_ahead_is_not_timed_further():
    times = FastestSize()
    assert run(times, {2: 1.8, 4: 1.0}) == [2, 4] * EARLY


def test_one_that_is_far_behind_is_timed_once():
    times = FastestSize()
    assert run(times, {2: 2.1, 4: 1.0, 8: 1.8}) == [2, 4, 8, *[4, 8] * (EARLY - 1)]


def test_a_size_that_is_alone_is_timed_once():
    times = FastestSize()
    assert run(times, {8: 1.0}) == [8]
    assert times.chosen() == (8, 8)


def test_a_size_that_comes_later_is_timed_as_often():
    times = FastestSize()
    run(times, {8: 1.0, 16: 1.1})
    times.tell(32, 0.9)
    asked = []
    while (size := times.next_measurement(ROUNDS)) is not None:
        asked.append(size)
        times.tell(size, 0.9)
    assert asked == [32] * (ROUNDS - 1)


def test_the_time_of_a_size_is_its_mean():
    times = FastestSize()
    for size, seconds in ((8, 1.0), (4, 2.0), (8, 2.0), (4, 2.0)):
        times.tell(size, seconds)
    assert times.seconds() == {4: 2.0, 8: 1.5}


def test_a_lucky_measurement_does_not_win():
    times = FastestSize()
    for size, seconds in ((16, 0.8), (32, 1.0), (16, 1.3), (32, 1.0), (16, 1.2), (32, 1.0)):
        times.tell(size, seconds)
    assert times.chosen() == (32, 32)


def test_an_early_disturbance_does_not_leave_the_fastest_out():
    measured = []

    def disturbed(size):
        measured.append(size)
        return 1.6 if size == 16 and measured.count(16) == 1 else 1.0

    times = FastestSize()
    run(times, {4: 1.2, 8: 1.1, 16: 1.0}, disturbed)
    assert times.chosen() == (16, 16)


@pytest.mark.parametrize(("seconds", "chosen"), [(1.015, 16), (1.03, 32)])
def test_a_smaller_size_wins_if_it_is_about_as_fast(seconds, chosen):
    times = FastestSize()
    for _ in range(2):
        times.tell(16, seconds)
        times.tell(32, 1.0)
    assert times.chosen() == (chosen, 32)


def test_what_does_not_fit_leaves_the_times():
    times = FastestSize()
    run(times, {4: 1.1, 8: 1.0})
    times.tell(16, 0.5)
    times.forget(16)
    times.forget(8)
    assert times.next_measurement(ROUNDS) is None
    assert times.chosen() == (4, 4)


def test_nothing_to_time_is_no_times():
    times = FastestSize()
    assert (times.seconds(), times.next_measurement(ROUNDS)) == ({}, None)


def test_noise_of_fifteen_percent_seldom_costs_five():
    sizes = {8: 1.3, 16: 1.1, 32: 1.02, 64: 1.0, 128: 1.08}
    chosen = []
    for seed in range(100):
        noise, times, spell = random.Random(seed), FastestSize(), [1.0]

        def disturbed(size, noise=noise, spell=spell):
            # Slow spells that pass, and jitter of each measurement.
            spell[0] = 0.7 * spell[0] + 0.3 * noise.uniform(0.75, 1.45)
            return spell[0] * noise.uniform(0.9, 1.1)

        run(times, sizes, disturbed)
        chosen.append(times.chosen()[0])
    assert sum(sizes[size] <= 1.05 for size in chosen) >= 98
