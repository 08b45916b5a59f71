"""Advice: the batch that it calls best is the minimum, and its words follow from the numbers."""

import json
import math

import numpy as np
import pytest

from virtualbatch import NoiseScale, Plan, PlanRow, WindowStats
from virtualbatch.noise.advice import advice


def given(scale, rows, *, interval=None, micro=8, row=0.001, update=0.008):
    return advice(
        scale,
        interval or (0.9 * scale, 1.1 * scale),
        rows=rows,
        microbatch_size=micro,
        seconds_per_row=row,
        seconds_per_update=update,
    )


@pytest.mark.parametrize("scale", [10.0, 1000.0, 50_000.0])
@pytest.mark.parametrize("update", [0.001, 0.008, 2.0])
def test_the_best_batch_takes_least_time(scale, update):
    batches = np.arange(1, 200_000)
    times = (1 + scale / batches) * (batches * 0.001 + update)
    found = given(scale, 64, update=update)
    assert found.best_rows == pytest.approx(batches[times.argmin()], rel=0.02, abs=1)
    assert found.time == pytest.approx(times[63] / times.min(), rel=1e-3)


def test_what_the_present_batch_costs():
    found = given(1000.0, 500)
    assert found.extra_rows == pytest.approx(0.5)
    assert found.extra_updates == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("scale", "rows", "options", "words"),
    [
        (1000.0, 89, {}, "are about right"),
        (1000.0, 1024, {"micro": 128}, "Accumulation does not pay here"),
        (1000.0, 1024, {"micro": 32}, "Such a large batch does not pay here"),
        (1000.0, 8, {}, "A larger batch pays"),
        (1000.0, 1024, {"interval": (10.0, math.inf)}, "Not certain yet"),
    ],
)
def test_the_verdict(scale, rows, options, words):
    found = given(scale, rows, **options)
    assert words in found.verdict
    assert found.verdict in str(found)
    assert bool(found.rules) == (words != "are about right")


def test_rules_follow_the_factor():
    found = given(1000.0, 1024, update=8 * 4.0)
    factor = found.best_rows / 1024
    sgd, square_root, half_life = found.rules
    assert sgd.learning_rate == pytest.approx(factor)
    assert square_root.learning_rate == pytest.approx(math.sqrt(factor))
    assert square_root.betas == pytest.approx((factor, factor))
    assert half_life.betas == pytest.approx((1.0, factor))
    assert "beta1" not in str(half_life)
    assert "Goyal" in str(sgd)


def test_json_has_no_infinity():
    text = given(1000.0, 64, interval=(10.0, math.inf)).to_json()
    assert json.loads(text)["best_high"] is None
    assert given(1000.0, 64)._repr_html_().startswith("<pre>")


@pytest.mark.parametrize("name", ["rows", "row", "update"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_bad_numbers_are_refused(name, value):
    options = {"rows": 64} | {name: value}
    with pytest.raises(ValueError, match="must be a positive number"):
        given(1000.0, **options)


# What the verdict would be within the estimate's uncertainty


def test_the_verdict_at_both_ends_is_told_where_it_differs():
    found = given(1000.0, 1024, interval=(900.0, 150_000.0))
    assert "Not certain yet" in found.verdict
    assert found.verdict_low == given(900.0, 1024).verdict
    assert "about right" in found.verdict_high
    assert f"at its highest: {found.verdict_high}" in str(found)
    assert "at its lowest" in str(found)


def test_an_upper_end_without_a_bound():
    found = given(1000.0, 89, interval=(900.0, math.inf))
    assert found.verdict_high == "A larger batch pays, however large it is."
    assert given(math.inf, 89, interval=(900.0, math.inf)).verdict.startswith("No signal")


def test_the_time_of_an_update_that_would_make_the_present_batch_best():
    found = given(1000.0, 1024)
    assert given(1000.0, 1024, update=found.break_even).best_rows == pytest.approx(1024)
    assert f"if an update cost {found.break_even:.3g} s" in str(found)


# Times from a plan


def plan(rows, chosen, *sizes, row=0.001, each=0.016):
    timed = [(size, rows * row + -(-rows // size) * each) for size in sizes]
    entries = tuple(PlanRow(size, None, True, seconds) for size, seconds in timed)
    return Plan(chosen, -(-rows // chosen), 2**30, "", entries)


def noise(rows=64):
    found = NoiseScale()
    for mean_square in (3.0, 3.2, 2.8, 3.0):
        found.update(WindowStats(rows, 4, mean_square, 1.0))
    return found


def test_a_plan_tells_what_a_row_and_an_update_cost():
    found = noise().advice(plan=plan(64, 16, 8, 16, 32))
    # At the chosen size a row carries its part of what each micro-batch costs.
    assert found.seconds_per_row == pytest.approx(0.001 + 0.016 / 16)
    assert found.seconds_per_update == pytest.approx(0.016)
    given = noise().advice(seconds_per_row=0.002, seconds_per_update=0.016)
    assert found.best_rows == pytest.approx(given.best_rows)


def test_a_time_that_is_given_stands_for_that_of_the_plan():
    found = noise().advice(plan=plan(64, 16, 8, 16), seconds_per_update=0.5)
    assert (found.seconds_per_update, found.seconds_per_row) == (0.5, pytest.approx(0.002))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"Got neither a plan nor both times\. Pass plan=, or measure them"),
        ({"seconds_per_row": 1.0}, r"Got neither a plan nor both times"),
        ({"plan": plan(512, 16, 8, 16)}, r"Got one of 32 micro-batches of 16 rows, for 64 rows"),
        ({"plan": plan(64, 16, 16)}, r"timed two sizes or more\. Got 1\."),
    ],
)
def test_advice_without_times_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        noise().advice(**options)
