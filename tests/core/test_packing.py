"""Rows sorted by length and packed by a budget of tokens."""

import copy
import dataclasses
import pickle
import warnings
from collections import UserDict, namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtualbatch import Window, pack
from virtualbatch.window.window import refuse_sorted_rows

Pair = namedtuple("Pair", "x y")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@dataclasses.dataclass(frozen=True)
class Text:
    ids: np.ndarray
    row: np.ndarray


def batch_of(lengths, padding=0):
    """Ids that tell their row and place, padded by 0, and the number of every row."""
    length = max(lengths) + padding
    rows = np.arange(len(lengths))
    ids = 1 + rows[:, None] * 1000 + np.arange(length)
    return {
        "ids": ids * (np.arange(length) < np.array(lengths)[:, None]),
        "row": rows,
        "text": [f"row {row}" for row in rows],
        "name": "all",
    }


@given(
    LENGTHS,
    st.integers(0, 5),
    st.integers(1, 400),
    st.one_of(st.none(), st.integers(1, 50)),
)
def test_every_row_is_there_once_and_whole(lengths, padding, tokens, round_to):
    batch = batch_of(lengths, padding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        window = pack(batch, lengths, microbatch_tokens=tokens, round_to=round_to)
    order = np.concatenate([found["row"] for found in window])
    assert sorted(order) == list(range(len(lengths)))
    # Longest first, and rows of one length in the order of the batch.
    assert list(order) == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for found in window:
        here = [lengths[row] for row in found["row"]]
        rows, length = found["ids"].shape
        assert rows == len(here)
        assert rows * length <= tokens or rows == 1
        if round_to is None:
            assert length == max(here)
        else:
            most = max(lengths) + padding
            assert length == min(-(-max(here) // round_to) * round_to, most)
        np.testing.assert_array_equal(found["ids"], batch["ids"][found["row"]][:, :length])
        # What was cut off is padding.
        assert not batch["ids"][found["row"]][:, length:].any()
        assert found["text"] == [f"row {row}" for row in found["row"]]
        assert found["name"] == "all"


@given(LENGTHS, st.integers(1, 400))
def test_without_round_to_no_micro_batch_could_take_the_next_row(lengths, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        window = pack(batch_of(lengths), lengths, microbatch_tokens=tokens)
    for found in window[:-1]:
        rows, length = found["ids"].shape
        assert (rows + 1) * length > tokens


@given(LENGTHS, st.integers(1, 400), st.integers(1, 40))
def test_round_to_bounds_the_shapes(lengths, tokens, round_to):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        window = pack(batch_of(lengths), lengths, microbatch_tokens=tokens, round_to=round_to)
    shapes = {found["ids"].shape for found in window}
    # All but the last have the same rows, so only the lengths differ.
    assert len({rows for rows, _ in (found["ids"].shape for found in window[:-1])}) <= 1
    assert len(shapes) <= -(-max(lengths) // round_to) + 1


def test_a_row_that_is_too_long_is_alone_with_one_warning():
    lengths = [3, 9, 8, 2]
    with pytest.warns(
        UserWarning,
        match=r"A row that is longer than microbatch_tokens is a micro-batch of its own\. "
        r"Got a row of 9 with microbatch_tokens=6\. Truncate such rows, or allow more tokens\.",
    ) as seen:
        window = pack(batch_of(lengths), lengths, microbatch_tokens=6)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert [found["row"].tolist() for found in window] == [[1], [2], [0, 3]]


def test_structures_stay_what_they_were():
    ids, row = np.array([[1, 0, 0], [1, 1, 1]]), np.arange(2)
    for structure, get in [
        (ids, lambda found: found),
        ((ids, row), lambda found: found[0]),
        ([ids, [row, None]], lambda found: found[0]),
        (Pair(ids, row), lambda found: found.x),
        (UserDict(ids=ids), lambda found: found["ids"]),
        (Text(ids, row), lambda found: found.ids),
    ]:
        window = pack(structure, [1, 3], microbatch_tokens=3)
        assert [type(found) for found in window] == [type(structure)] * 2
        assert [get(found).tolist() for found in window] == [[[1, 1, 1]], [[1]]]


def test_the_batch_is_not_changed():
    lengths = [2, 5, 1]
    batch = batch_of(lengths)
    before = copy.deepcopy(batch)
    for found in pack(batch, lengths, microbatch_tokens=6):
        found["ids"][:] = -1
    np.testing.assert_equal(batch, before)


# Which leaves are trimmed


IDS = np.ones((2, 4), "int32")


def shapes(batch, **options):
    window = pack(batch, [1, 3], microbatch_tokens=100, **options)
    assert len(window) == 1
    return [leaf.shape for leaf in window[0]]


@pytest.mark.parametrize(
    ("other", "shape"),
    [
        (np.ones((2, 4), bool), (2, 3)),
        (np.ones((2, 4), "float32"), (2, 3)),
        (np.ones((2, 4, 5), "uint8"), (2, 3, 5)),
        (np.ones((2, 7), "float64"), (2, 7)),
        (np.ones((2, 2), "int64"), (2, 2)),
        (np.ones((2, 1, 4)), (2, 1, 4)),
        (np.ones(2), (2,)),
    ],
    ids=lambda found: f"{found.dtype} {found.shape}" if hasattr(found, "dtype") else "",
)
def test_what_is_trimmed_by_itself(other, shape):
    assert shapes([IDS, other]) == [(2, 3), shape]


def test_float_leaves_are_trimmed_where_there_are_no_others():
    assert shapes([np.ones((2, 4)), np.ones(2)]) == [(2, 3), (2,)]


def test_padded_tells_what_is_trimmed():
    series = np.ones((2, 4, 5))
    assert shapes([series, IDS], padded=[True, False]) == [(2, 3, 5), (2, 4)]
    assert shapes([series, IDS], padded=[True, True]) == [(2, 3, 5), (2, 3)]


@pytest.mark.parametrize(
    "other", [np.ones((2, 4, 5)), np.ones((2, 4, 4), bool), np.ones((2, 4), complex)], ids=str
)
def test_an_unclear_leaf_asks_for_padded(other):
    with pytest.raises(
        ValueError,
        match=r"A second axis of the padded length is trimmed in integer .* Got batch\[1\] of "
        r"shape .* and a padded length of 4\. Pass padded=",
    ):
        shapes([IDS, other])


def test_two_lengths_ask_for_padded():
    with pytest.raises(
        ValueError, match=r"must be clear which leaves .* Got batch\[0\] .* batch\[1\]"
    ):
        shapes([IDS, np.ones((2, 6), int)])


@pytest.mark.parametrize("batch", [[np.ones(2)], [np.ones((2, 4, 5))], [np.ones(2, int)]], ids=str)
def test_no_padded_leaf_is_refused(batch):
    with pytest.raises(ValueError, match=r"must be clear which leaves .* Got none\. Pass padded="):
        shapes(batch)


@pytest.mark.parametrize(
    ("padded", "text"),
    [
        ([True], r"padded must have the structure of the batch\. Got batch\[0\] for batch\[0\], "),
        ({"x": True}, r"padded must have the structure of the batch\."),
        (True, r"padded must have the structure of the batch\."),
        ([True, None], r"padded must hold booleans\. Got padded\[1\]=None"),
        ([1, False], r"padded must hold booleans\. Got padded\[0\]=1"),
        (
            [True, True],
            r"must be an array with a second axis\. Got padded\[1\]=True for batch\[1\]",
        ),
        ([False, False], r"must share one padded length.* Got no padded leaf\."),
    ],
)
def test_padded_must_fit(padded, text):
    with pytest.raises(ValueError, match=text):
        shapes([IDS, np.ones(2)], padded=padded)


def test_padded_leaves_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match=r"must share one padded length.* \(2, 4\) .* \(2, 6\)"):
        shapes([IDS, np.ones((2, 6))], padded=[True, True])


# Refusals


@pytest.mark.parametrize("tokens", [0, -1, True, 1.5, "4", None], ids=repr)
def test_tokens_must_be_a_positive_integer(tokens):
    with pytest.raises(
        ValueError, match=r"microbatch_tokens must be a positive integer\. Got microbatch_tokens="
    ):
        pack(IDS, [1, 3], microbatch_tokens=tokens)


@pytest.mark.parametrize("round_to", [0, -64, 1.5, False], ids=repr)
def test_round_to_must_be_a_positive_integer(round_to):
    with pytest.raises(ValueError, match=r"round_to must be a positive integer\. Got round_to="):
        pack(IDS, [1, 3], microbatch_tokens=4, round_to=round_to)


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        (
            [1, 5],
            ValueError,
            r"No length may exceed the padded axis\. Got a length of 5 and batch ",
        ),
        ([1, 0], ValueError, r"A length must be at least 1\. Got lengths\[1\]=0\."),
        ([-2, 3], ValueError, r"A length must be at least 1\. Got lengths\[0\]=-2\."),
        (np.array([2, 3], "uint64") - np.uint64(3), ValueError, r"Got lengths\[0\]=-1\."),
        ([1], ValueError, r"one length per row\. Got lengths of shape \(1,\) for 2 rows\."),
        ([1, 2, 3], ValueError, r"one length per row\. Got lengths of shape \(3,\) for 2 rows\."),
        ([[1, 3]], ValueError, r"one length per row\. Got lengths of shape \(1, 2\) for 2 rows\."),
        (2, ValueError, r"one length per row\. Got lengths of shape \(\) for 2 rows\."),
        ([1.0, 3.0], TypeError, r"lengths must be integers\. Got lengths of dtype float64\."),
    ],
)
def test_lengths_must_fit(lengths, error, text):
    with pytest.raises(error, match=text):
        pack(IDS, lengths, microbatch_tokens=4)


@pytest.mark.parametrize("leaf", [object(), {1, 2}, range(2)], ids=["object", "set", "range"])
def test_a_leaf_that_cannot_be_sorted_is_refused(leaf):
    with pytest.raises(TypeError, match=r"pack sorts dense arrays .* Got batch\['x'\] of type"):
        pack({"ids": IDS, "x": leaf}, [1, 3], microbatch_tokens=4)


def test_rows_must_agree():
    with pytest.raises(
        ValueError, match=r"All arrays of a batch must have the same number of rows"
    ):
        pack([IDS, np.ones(3)], [1, 3], microbatch_tokens=4)


# What a window knows of its rows


def test_a_packed_window_says_so():
    window = pack(IDS, [1, 3], microbatch_tokens=3)
    assert window.sorted_rows
    assert window[:1].sorted_rows
    assert pickle.loads(pickle.dumps(window)).sorted_rows
    assert copy.copy(window).sorted_rows
    metadata, components = window.__tf_flatten__()
    assert Window.__tf_unflatten__(metadata, components).sorted_rows
    assert not Window(window).sorted_rows
    assert Window([], sorted_rows=True).sorted_rows


def test_noise_statistics_of_sorted_rows_are_refused():
    window = pack(IDS, [1, 3], microbatch_tokens=3)
    refuse_sorted_rows(window, False)
    refuse_sorted_rows(Window(window), True)
    refuse_sorted_rows(IDS, True)
    with pytest.raises(
        ValueError,
        match=r"Noise statistics need micro-batches of random rows\. Got stats=True with a Window "
        r"whose rows are sorted by length\. Take them from windows that are not packed",
    ):
        refuse_sorted_rows(window, True)
