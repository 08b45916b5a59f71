"""Where rows meet, found from whole values and from sketches alike."""

import numpy as np
import pytest

from virtualbatch.certify import activations
from virtualbatch.certify.activations import (
    Recording,
    first_difference,
    first_not_finite,
    reduced_at,
    same_values,
)
from virtualbatch.certify.sketch import Sketch

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 5, 3))


@pytest.fixture(params=["whole", "sketched", "some of each"], autouse=True)
def budget(request, monkeypatch):
    size = {"whole": 2**28, "sketched": 0, "some of each": X[:4].nbytes}[request.param]
    monkeypatch.setattr(activations, "_KEPT_BYTES", size)


def recorded(*values):
    recording = Recording()
    for index, value in enumerate(values):
        recording.add(f"line {index}", "", np.array(value, np.float64))
    return recording.activations


def by_parts(model):
    return recorded(*model(X)), [recorded(*model(x)) for x in (X[:4], X[4:])]


def coupled(x):
    return x, x.mean(1), x - x.mean(0)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: (x, np.tanh(x), x.mean((1, 2)), x.mean()),
        lambda x: (np.moveaxis(x, 0, 1), np.moveaxis(x, 0, 2) + 1),
        lambda x: (x.reshape(-1, 3), np.moveaxis(x, 0, 1).reshape(-1, 3)),
        lambda x: (np.where(x > 0, x, -np.inf), np.where(x > 0, np.nan, x)),
    ],
)
def test_values_of_rows_agree(model):
    whole, parts = by_parts(model)
    assert first_difference(whole, parts, 1e-9) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x - x.mean(0),
        lambda x: np.where(np.arange(15).reshape(5, 3) == 7, x - 1e-6 * x.sum(0), x),
        lambda x: x[::-1],
        lambda x: np.moveaxis(x / x.std(0), 0, 2),
        lambda x: np.where(x.sum(0) > 0, -np.inf, x),
        lambda x: np.where(x.sum(0) > 0, np.nan, np.inf) + x,
        lambda x: (x - x.mean(0)).reshape(-1, 3),
    ],
)
def test_the_first_value_that_couples_rows(change):
    whole, parts = by_parts(lambda x: (x, np.tanh(x), change(x), x.mean()))
    assert first_difference(whole, parts, 1e-9).where == "line 2"


def test_the_reduction():
    whole, parts = by_parts(lambda x: (x, x.sum((1, 2)), x.sum(), x.sum() + 1))
    assert reduced_at(whole, parts).where == "line 2"


def test_rows_that_are_not_finite():
    bad = X.copy()
    bad[[2, 7], 1, 1] = np.nan, np.inf
    masked = np.where(X > 0, X, -np.inf)
    found, rows = first_not_finite(recorded(X, masked, bad), 12)
    assert (found.where, rows) == ("line 2", [2, 7])
    found, rows = first_not_finite(recorded(X, bad.sum()), 12)
    assert (found.where, rows) == ("line 1", [])
    assert first_not_finite(recorded(X, masked), 12) is None


def test_runs_on_the_same_rows():
    (first,) = recorded(X)
    for other, same in [(X, True), (X + 1e-12, True), (X + 1e-3, False), (X[:11], False)]:
        assert same_values(first, recorded(other)[0], 1e-9) == same


def test_no_more_is_kept_than_the_budget(monkeypatch):
    monkeypatch.setattr(activations, "_KEPT_BYTES", 3 * X.nbytes)
    values = [activation.value for activation in recorded(*[X] * 5)]
    assert [isinstance(value, Sketch) for value in values] == [False] * 3 + [True] * 2


def test_axes_of_very_many_entries_are_passed_over():
    long = np.arange(2.0**15)
    whole, parts = recorded(long), [recorded(long[:1024]), recorded(-long[1024:])]
    kept_whole = isinstance(whole[0].value, np.ndarray)
    assert kept_whole == (first_difference(whole, parts, 1e-9) is not None)
