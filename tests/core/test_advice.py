"""Advice: the batch that it calls best is the minimum, and its words follow from the numbers."""

import json
import math

import numpy as np
import pytest

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
