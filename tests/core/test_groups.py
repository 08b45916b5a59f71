"""Rows that belong together stay in one micro-batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtualbatch import whole_groups

SIZES = [8, 8, 5, 8, 10, 7, 9]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(0, 20))
def test_every_row_comes_once_and_no_group_is_parted(groups, room):
    size = max(groups.count(group) for group in groups) + room
    batch = {"row": np.arange(len(groups)), "name": [str(group) for group in groups], "all": "x"}
    window = whole_groups(batch, groups, microbatch_size=size)
    rows = [row for piece in window for row in piece["row"].tolist()]
    assert sorted(rows) == list(range(len(groups)))
    held = [{groups[row] for row in piece["row"]} for piece in window]
    assert sum(map(len, held)) == len(set(groups))
    for piece in window:
        assert len(piece["row"]) <= size
        assert piece["name"] == [str(groups[row]) for row in piece["row"]]
        assert piece["all"] == "x"


def test_groups_come_in_the_order_of_their_first_rows():
    groups = np.repeat(np.arange(len(SIZES)), SIZES)
    window = whole_groups({"g": groups}, groups, microbatch_size=10)
    assert [len(piece["g"]) for piece in window] == SIZES
    window = whole_groups({"g": groups}, groups, microbatch_size=16)
    assert [len(piece["g"]) for piece in window] == [16, 13, 10, 16]


def test_rows_of_a_group_need_not_be_neighbours():
    window = whole_groups(np.arange(6), ["b", "a", "b", "c", "a", "b"], microbatch_size=3)
    assert [piece.tolist() for piece in window] == [[0, 2, 5], [1, 4, 3]]


@pytest.mark.parametrize(
    ("groups", "size", "text"),
    [
        ([7, 7, 7], 2, r"Got a group of 3 rows \(7\) and microbatch_size=2.*rowwise"),
        ([0, 1], 2, r"Got groups of shape \(2,\) for 3 rows"),
        ([0.0, 1.0, 1.0], 2, "Got groups of floating numbers"),
        ([0, 1, 1], 0, "must be a positive integer"),
    ],
)
def test_what_cannot_be_grouped_is_refused(groups, size, text):
    with pytest.raises(ValueError, match=text):
        whole_groups({"x": np.ones((3, 2))}, groups, microbatch_size=size)


def test_an_array_of_no_known_framework_is_refused():
    class Odd:
        shape = (3,)

    with pytest.raises(TypeError, match=r"Got batch\['x'\] of type Odd"):
        whole_groups({"x": Odd()}, [0, 1, 1], microbatch_size=2)
