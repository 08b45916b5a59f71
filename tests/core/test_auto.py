"""Sizes in force: planned once, remembered, made smaller, grown again."""

import logging
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.core.plans import Planner, signature

from virtualbatch.plan.auto import Auto, CurrentSize, check_sizes_or_auto
from virtualbatch.plan.signature import Leaf


def test_a_signature_is_planned_once():
    auto, planner = Auto(), Planner(16)
    assert auto.planned(signature(), planner).rows == 16
    assert auto.planned(signature(), planner).rows == 16
    assert planner.sizes == []


@pytest.mark.parametrize(
    ("other", "planned_again"),
    {
        "a short last batch": (signature(rows=7), False),
        "more rows": (signature(rows=65), True),
        "shorter text": (signature(length=3), False),
        "longer text": (signature(length=11), True),
        "another program": (signature(program="torch on cuda"), True),
        "another loss": (signature(loss="loss 2"), True),
        "another structure": (signature(place="batch['z']"), True),
        "another dtype": (signature(dtype="float64"), True),
        "fewer arrays": (signature()._replace(leaves=signature().leaves[:1]), True),
        "another rank": (
            signature()._replace(leaves=(Leaf("batch['x']", (10,), "float32"),) * 2),
            True,
        ),
    }.values(),
)
def test_a_plan_covers_what_is_no_larger(other, planned_again):
    auto = Auto()
    auto.planned(signature(), Planner(16))
    assert auto.planned(other, Planner(4)).rows == (4 if planned_again else 16)


@pytest.mark.parametrize(
    ("before", "after", "again"),
    [("2GiB", "1GiB", True), ("2GiB", 2**31, False), (None, "1GiB", True), ("1GiB", "2GiB", True),
     ("80%", "80%", False), ("80%", "40%", True)],
)  # fmt: skip
def test_a_plan_of_a_file_is_for_its_memory_limit(tmp_path, before, after, again):
    file = tmp_path / "plans.json"
    Auto(file=file, memory_limit=before).planned(signature(), Planner(16))
    found = Auto(file=file, memory_limit=after).planned(signature(), Planner(4))
    assert found.rows == (4 if again else 16)
    # Both are kept.
    assert Auto(file=file, memory_limit=before).planned(signature(), Planner()).rows == 16


@pytest.mark.parametrize("grow_after", [0, -1, 1.5, True, "10"])
def test_growing_after_no_number_of_windows_is_refused(grow_after):
    with pytest.raises(ValueError, match=r"grow_after must be a positive number of windows"):
        Auto(grow_after=grow_after)


def test_the_choice_is_logged_once(caplog):
    auto = Auto()
    with caplog.at_level(logging.INFO, "virtualbatch"):
        for _ in range(3):
            auto.planned(signature(), Planner(16))
    assert caplog.messages == [
        "microbatch_size=16 for batches of up to 64 rows, memory limit 1.0 MiB (planned): It fits."
    ]


def test_a_smaller_size_is_kept_for_what_was_asked():
    auto = Auto()
    assert auto.asked(32).shrink(32)
    assert auto.asked(32).rows == 16
    assert auto.asked(64).rows == 64


@given(st.integers(1, 10_000))
def test_shrinking_ends(rows):
    size = CurrentSize(rows, None)
    tried = [size.rows]
    while size.shrink(size.rows):
        tried.append(size.rows)
    assert tried[-1] == 1
    assert all(2 * after <= before for before, after in pairwise(tried))
    assert size.rows == 1


def test_a_short_batch_that_ran_out_counts_with_its_own_rows():
    size = CurrentSize(64, None)
    size.shrink(10)
    assert size.rows == 5


def test_a_smaller_size_never_grows_by_itself():
    size = CurrentSize(8, None)
    size.shrink(8)
    for _ in range(100):
        size.succeeded()
    assert size.rows == 4


def test_a_smaller_size_grows_when_asked():
    size = CurrentSize(12, 3)
    size.shrink(12)
    size.shrink(6)
    found = []
    for _ in range(9):
        size.succeeded()
        found.append(size.rows)
    assert found == [3, 3, 6, 6, 6, 12, 12, 12, 12]


def test_running_out_again_begins_the_count_anew():
    size = CurrentSize(12, 2)
    size.shrink(12)
    size.succeeded()
    size.shrink(6)
    size.succeeded()
    assert size.rows == 3


def test_running_out_is_logged_with_both_sizes(caplog):
    CurrentSize(64, None).shrink(50)
    assert "micro-batches of 50 rows" in caplog.text
    assert "micro-batches of 25 rows, which are kept" in caplog.text


def test_it_grows_no_larger_than_planned():
    # 50, halved twice, is 12: four times that, doubled again, would be 96.
    size = CurrentSize(50, grow_after=1)
    assert size.shrink(50)
    assert size.shrink(25)
    for rows in (24, 48, 50, 50):
        size.succeeded()
        assert size.rows == rows


def test_automatic_sizes_are_legal_alone():
    for size in ("auto", Auto()):
        check_sizes_or_auto(size, None)
        with pytest.raises(ValueError, match=r"Got accumulation_steps=2 with it\. Leave one"):
            check_sizes_or_auto(size, 2)


def test_it_shows_what_it_was_made_with(tmp_path):
    file = tmp_path / "plans.json"
    assert repr(Auto()) == "Auto()"
    assert (
        repr(Auto(memory_limit="2GiB", grow_after=9)) == "Auto(memory_limit='2GiB', grow_after=9)"
    )
    assert repr(Auto(file=file)) == f"Auto(file={str(file)!r})"
