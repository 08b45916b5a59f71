"""Lists of a batch: which are one leaf, and which follow the rows."""

from collections import namedtuple

import numpy as np
import pytest

from virtualbatch.window.row_list import RowList, is_list, shown
from virtualbatch.window.tree import builder, with_row_lists

Pair = namedtuple("Pair", "x y")
A = np.zeros((3, 2))


class Shape(tuple):
    """As frameworks give them."""


class Image:
    """Of the user's own."""


@pytest.mark.parametrize(
    "leaf",
    [
        [5, 4, 2],
        (True, None, 2.5),
        ["a", b"b"],
        [[1, 2], [3]],
        [{"id": 3, "box": [1, 2]}],
        [np.float32(1), np.int64(2)],
        [Image(), Image()],
        [Pair(1, 2), Pair(3, 4)],
    ],
    ids=repr,
)
def test_a_list_without_an_array_is_one_leaf(leaf):
    assert is_list(leaf)
    found = []
    builder({"x": A, "more": leaf}, "batch", found)
    assert [path for path, _ in found] == ["batch['x']", "batch['more']"]


@pytest.mark.parametrize(
    "structure",
    [[A, 1], [[1], [A]], [{"x": A}], [Pair(A, 1)], [], (), Pair(1, 2), Shape((1, 2)), {"a": 1}, 3],
    ids=str,
)
def test_other_structures_stay_what_they_are(structure):
    assert not is_list(structure)


def test_only_a_list_as_long_as_the_batch_follows_its_rows():
    two, three = ["a", "b"], (1, 2, 3)
    marked = with_row_lists([A, two, three, 3], 3)
    assert [type(leaf) for leaf in marked] == [np.ndarray, list, RowList, int]
    row_list = marked[2]
    assert row_list.cut(1, 3).items == (2, 3)
    assert row_list.chosen([2, 0]).items == (3, 1)
    assert row_list.stretched(5).items == (1, 2, 3, 1, 2)


def test_a_loss_function_may_change_the_lists_that_it_gets():
    given = {"x": A, "names": ["a", "b"], "rows": [1, 2, 3]}
    found = []
    build = builder(given, "batch", found)
    built = build(with_row_lists([leaf for _, leaf in found], 3))
    built["names"].append("c")
    built["rows"].pop()
    assert given["names"] == ["a", "b"]
    assert given["rows"] == [1, 2, 3]
    assert shown((1, 2)) == (1, 2)
