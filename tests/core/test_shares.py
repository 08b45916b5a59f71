"""The law's arithmetic: any cut, any order, any weights."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.oracle import assert_close

from virtualbatch.window.shares import (
    Moments,
    accumulator_dtype,
    merge_moments,
    shares,
)
from virtualbatch.window.weights import host_shares

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.integers(0, 10**6), st.floats(0, 1e300, allow_subnormal=False)),
    max_size=30,
)
# Rows as (value, weight): a weight of 0 is a masked token.
ROWS = st.lists(
    st.tuples(st.integers(-1000, 1000), st.sampled_from([0, 1, 1, 2, 5])), min_size=1, max_size=40
)


def cut_into_pieces(data, items):
    """Any cut of a list, with empty pieces too, in any order."""
    stops = data.draw(st.lists(st.integers(0, len(items)), max_size=6).map(sorted))
    edges = [0, *stops, len(items)]
    pieces = [items[a:b] for a, b in itertools.pairwise(edges)]
    return data.draw(st.permutations(pieces))


@pytest.mark.parametrize(
    ("dtype", "buffer"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float8_e4m3fn", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        ("complex64", "complex64"),
        ("complex128", "complex128"),
    ],
)
def test_the_buffer_is_at_least_float32(dtype, buffer):
    assert accumulator_dtype(dtype) == buffer


@given(WEIGHTS)
def test_shares_sum_to_one_or_are_all_zero(weights):
    found = shares(weights)
    assert len(found) == len(weights)
    assert all(0 <= share <= 1 for share in found)
    if any(weights):
        assert math.isclose(math.fsum(found), 1, rel_tol=len(found) * 2.0**-53)
    else:
        assert found == [0.0] * len(weights)


@given(WEIGHTS)
def test_a_share_is_the_weight_over_the_total_to_one_rounding(weights):
    total = sum(map(Fraction, weights))
    for share, weight in zip(shares(weights), weights, strict=True):
        exact = Fraction(weight) / total if total else Fraction(0)
        assert math.isclose(share, exact, rel_tol=2.0**-51, abs_tol=1e-320)


@given(ROWS, st.data())
def test_the_law_holds_for_any_cut_in_any_order(rows, data):
    pieces = cut_into_pieces(data, rows)
    weights = [sum(weight for _, weight in piece) for piece in pieces]
    # A micro-batch without items has no mean; it is left out, never multiplied by 0.
    means = [
        Fraction(sum(value * weight for value, weight in piece), total) if total else None
        for piece, total in zip(pieces, weights, strict=True)
    ]
    parts = [
        share * float(mean)
        for share, mean in zip(shares(weights), means, strict=True)
        if mean is not None
    ]
    total = sum(weight for _, weight in rows)
    uncut = Fraction(sum(value * weight for value, weight in rows), total or 1)
    assert math.isclose(math.fsum(parts), uncut, rel_tol=1e-12, abs_tol=1e-12 * 1000)
    assert total or parts == []


@pytest.mark.parametrize("weights", [[], [0], [0.0, 0.0, 0.0]])
def test_an_empty_window_has_no_shares(weights):
    assert shares(weights) == [0.0] * len(weights)


@pytest.mark.parametrize("bad", [-1, -1e-300, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_a_weight_that_is_none_is_refused_with_its_micro_batch(bad, place):
    weights = [1.0, 1.0, 1.0]
    weights[place] = bad
    with pytest.raises(
        ValueError,
        match=rf"A weight must be a finite number, 0 or more\. Got weight={bad} for "
        rf"micro-batch {place}\. Return what the loss of that micro-batch was divided by",
    ):
        shares(weights)


# Merging: groups of whole numbers make NumPy's result and the exact one the same.
VALUES = st.lists(st.integers(-1000, 1000), min_size=1, max_size=40)


def moments_of(values, number=float):
    """Moments of a list, in the arithmetic of `number`; the mean of nothing is 0."""
    values = [number(value) for value in values]
    if not values:
        return Moments(number(0), number(0), number(0))
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return Moments(number(len(values)), mean, variance)


def divide_no_nan(a, b):
    return a / b if b else 0 * a


def merged(groups, data):
    """Merges groups two at a time until one is left, in any grouping."""
    groups = list(groups)
    while len(groups) > 1:
        index = data.draw(st.integers(0, len(groups) - 2))
        groups[index : index + 2] = [merge_moments(groups[index], groups[index + 1], divide_no_nan)]
    return groups[0]


@given(VALUES, st.data())
def test_merging_is_exact_in_exact_arithmetic(values, data):
    pieces = cut_into_pieces(data, values)
    groups = [moments_of(piece, Fraction) for piece in pieces]
    assert merged(groups, data) == moments_of(values, Fraction)


@given(VALUES, st.data())
def test_merging_equals_numpy_on_the_union(values, data):
    pieces = cut_into_pieces(data, values)
    found = merged([moments_of(piece) for piece in pieces], data)
    assert found.weight == len(values)
    assert math.isclose(found.mean, np.mean(values), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(found.variance, np.var(values), rel_tol=1e-9, abs_tol=1e-9)


def test_merging_works_along_arrays():
    values = np.random.default_rng(0).normal(size=(9, 4))
    a, b = (Moments(len(x), x.mean(0), x.var(0)) for x in (values[:2], values[2:]))
    found = merge_moments(a, b)
    assert_close(found.mean, values.mean(0))
    assert_close(found.variance, values.var(0))


def test_a_large_mean_does_not_cancel_a_small_variance():
    values = 1e8 + np.random.default_rng(0).normal(size=1000)
    found = Moments(0.0, 0.0, 0.0)
    for start in range(0, 1000, 30):
        piece = values[start : start + 30]
        found = merge_moments(found, Moments(len(piece), piece.mean(), piece.var()))
    assert_close(found.variance, values.var(), rtol=1e-7)
    # The textbook's shortcut loses it, so this test can tell them apart.
    assert abs((values**2).mean() - values.mean() ** 2 - values.var()) > 0.1


@pytest.mark.parametrize("order", [0, 1])
def test_an_empty_group_changes_nothing(order):
    some, none = moments_of([3, 5, 10]), moments_of([])
    pair = (some, none) if order else (none, some)
    found = merge_moments(*pair, divide_no_nan)
    assert found.weight == 3
    assert_close([found.mean, found.variance], [some.mean, some.variance])


def test_two_empty_groups_stay_empty():
    assert merge_moments(moments_of([]), moments_of([]), divide_no_nan) == (0, 0, 0)


# Shares of a window


def window_of(weight, rows=(1, 3)):
    return host_shares(rows, weight, range(len(rows)), lambda values: values)


def test_without_weights_every_term_goes_by_rows():
    found = window_of(None)
    assert (found.terms, found.window, found.of_rows_or_term()) == (None, 4, [0.25, 0.75])
    assert found.of(["a", "b"], 1) == [0.75, 0.75]
    assert not found.is_empty(0)


def test_each_term_has_shares_of_its_own_and_a_steady_one_those_of_the_rows():
    found = window_of([{"a": 0, "b": None, "c": 1}, {"c": 0, "a": 2, "b": None}].__getitem__)
    assert found.terms == {"a": [0, 1], "b": [0.25, 0.75], "c": [1, 0]}
    assert found.certain == {"b"}
    assert found.of(["c", "a", "b"], 0) == [1, 0, 0.25]
    assert found.of_rows_or_term() == [0.25, 0.75]
    assert found.mapped(lambda vector: vector[:1]).terms == {"a": [0], "b": [0.25], "c": [1]}


def test_the_shares_of_a_sum_are_one():
    every = window_of("sum")
    assert (every.terms, every.of(["a", "b"], 1), every.is_empty(0)) == (None, [1, 1], False)
    # What a micro-batch is of the window still goes by rows.
    assert every.of_rows_or_term() == [0.25, 0.75]
    among = window_of([{"a": 0, "b": "sum"}, {"a": 2, "b": "sum"}].__getitem__)
    assert among.terms == {"a": [0, 1], "b": [1, 1]}
    assert (among.certain, among.is_empty(0)) == ({"b"}, False)
    alone = window_of([{"b": "sum"}, {"b": "sum"}].__getitem__)
    assert alone.of_rows_or_term() == [0.25, 0.75]


def test_a_total_beside_its_parts_needs_weights_of_its_own():
    with pytest.raises(ValueError, match="count twice"):
        window_of(None).of(["loss", "ce"], 0)
    named = window_of(([{"loss": 1, "ce": 1}] * 2).__getitem__)
    assert named.of(["loss", "ce"], 0) == [0.5, 0.5]


def test_a_micro_batch_is_empty_where_no_term_counts():
    one = window_of([0, 2].__getitem__)
    assert [one.is_empty(0), one.is_empty(1), one.counted] == [True, False, 1]
    assert one.of_rows_or_term() == [0, 1]
    # What does not depend on the rows always counts.
    steady = window_of([{"a": 0, "b": None}, {"a": 0, "b": None}].__getitem__)
    assert [steady.is_empty(0), steady.is_empty(1)] == [False, False]


def test_a_micro_batch_in_which_a_term_has_no_share_and_that_with_its_largest():
    assert window_of(None).empty_and_full() is None
    assert window_of("sum").empty_and_full() is None
    assert window_of([1, 0].__getitem__).empty_and_full() == (1, 0)
    assert window_of([1, 0, 0, 5].__getitem__, (1, 1, 1, 1)).empty_and_full() == (1, 3)
    # What is never empty does not hide what is; what is empty everywhere has no largest.
    terms = [{"a": 1, "b": 2, "c": None, "d": "sum"}, {"a": 1, "b": 0, "c": None, "d": "sum"}]
    assert window_of(terms.__getitem__).empty_and_full() == (1, 0)
    assert window_of([terms[0], terms[0]].__getitem__).empty_and_full() is None
    assert window_of([0, 0].__getitem__).empty_and_full() is None


def test_shares_of_other_terms_are_refused():
    with pytest.raises(ValueError, match="weight must name the same terms as the loss"):
        window_of([{"a": 1}, {"a": 1}].__getitem__).of(["b"], 0)
