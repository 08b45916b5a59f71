"""A loss and its weights as named terms, and every refusal about them."""

from typing import NamedTuple

import numpy as np
import pytest

from virtualbatch.window.terms import (
    WeightFunction,
    check_same_terms,
    check_total,
    loss_and_aux,
    loss_terms,
    weight_terms,
)


class Tensor(NamedTuple):
    """As much of a tensor as the core looks at."""

    shape: tuple = ()
    dtype: str = "float32"


class OpenShape:
    """A traced shape of unknown rank, as TensorFlow has it."""

    rank = None

    def __len__(self):
        raise ValueError("Cannot take the length of shape with unknown rank.")


SCALAR = Tensor()


def test_a_scalar_is_one_term():
    assert loss_terms(SCALAR) == {"loss": SCALAR}


def test_a_dict_names_its_terms():
    assert loss_terms({"a": SCALAR, 1: SCALAR}) == {"a": SCALAR, 1: SCALAR}


def test_an_unknown_rank_is_left_to_the_engine():
    term = Tensor(OpenShape())
    assert loss_terms(term) == {"loss": term}


def test_the_given_dict_is_not_kept():
    given = {"a": SCALAR}
    loss_terms(given)["b"] = SCALAR
    weight_terms(given)["b"] = SCALAR
    assert given == {"a": SCALAR}


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        ({}, ValueError, r"at least one term\. Got an empty dict\. Return a scalar, or a dict"),
        (1.0, TypeError, r"Got loss_fn\(batch\) of type float\."),
        (None, TypeError, r"Got loss_fn\(batch\) of type NoneType\."),
        ((SCALAR, 3), TypeError, r"of type tuple\. If it returns \(loss, aux\), pass has_aux=True"),
        ({"a": SCALAR, "b": 1}, TypeError, r"Got loss_fn\(batch\)\['b'\] of type int\."),
        (Tensor((4,)), ValueError, r"Got loss_fn\(batch\) with shape \(4,\)\. Reduce it"),
        (Tensor((1,)), ValueError, r"Got loss_fn\(batch\) with shape \(1,\)\."),
        ({"a": Tensor((2, 3))}, ValueError, r"Got loss_fn\(batch\)\['a'\] with shape \(2, 3\)\."),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss, error, text):
    with pytest.raises(error, match=text):
        loss_terms(loss)


def test_without_aux_the_result_is_the_loss():
    assert loss_and_aux(SCALAR, has_aux=False) == (SCALAR, None)


@pytest.mark.parametrize("pair", [(SCALAR, "aux"), [SCALAR, "aux"]])
def test_with_aux_the_result_is_a_pair(pair):
    assert loss_and_aux(pair, has_aux=True) == (SCALAR, "aux")


@pytest.mark.parametrize(
    ("result", "got"),
    [(1.0, "float"), ((SCALAR,), "tuple"), ((SCALAR, 1, 2), "tuple"), ({"a": SCALAR}, "dict")],
)
def test_with_aux_anything_but_a_pair_is_refused(result, got):
    with pytest.raises(
        TypeError, match=rf"must return \(loss, aux\)\. Got {got}\. Return a pair, or leave has_aux"
    ):
        loss_and_aux(result, has_aux=True)


@pytest.mark.parametrize(
    ("weight", "terms"),
    [
        (3, {"loss": 3}),
        (SCALAR, {"loss": SCALAR}),
        ({"a": 1, "b": None, "c": "sum"}, {"a": 1, "b": None, "c": "sum"}),
    ],
)
def test_weights_by_term(weight, terms):
    assert weight_terms(weight) == terms


def test_the_same_names_in_any_order_are_accepted():
    check_same_terms({"a": 1, "b": 2}, {"b": None, "a": 1})


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        ({"a": 1}, r"Got loss terms \['a', 'b'\] and weight terms \['a'\]\."),
        ({"a": 1, "b": 1, "c": 1}, r"and weight terms \['a', 'b', 'c'\]\."),
        ({"loss": 1}, r"and weight terms \['loss'\]\. Return one weight for each term; None marks"),
    ],
)
def test_other_names_are_refused(weight, text):
    with pytest.raises(ValueError, match=text):
        check_same_terms({"b": 1, "a": 1}, weight)


@pytest.mark.parametrize(
    ("weight", "got"),
    [
        (None, "None for term 'loss'"),
        ("3", "'3' for term 'loss'"),
        ({"a": [1.0]}, r"\[1\.0\] for term 'a'"),
        ({"a": Tensor((2, 1))}, r"shape \(2, 1\) for term 'a'"),
    ],
)
def test_a_weight_that_is_not_one_number_is_refused(weight, got):
    with pytest.raises(ValueError, match=rf"one number per micro-batch and term\. Got {got}\."):
        weight_terms(weight)


@pytest.mark.parametrize("weight", [1j, np.complex64(1), np.array("3"), np.array(None)])
def test_a_weight_that_is_no_real_number_is_refused(weight):
    got = weight.dtype.name if hasattr(weight, "dtype") else "complex"
    with pytest.raises(TypeError, match=rf"must be a real number\. Got {got} for term 'loss'\."):
        weight_terms(weight)


def test_weights_are_given_in_the_order_of_the_first_micro_batch():
    first = {"a": 2.0, "b": None, "c": 3, "d": "sum"}
    later = {"c": 4, "b": None, "d": "sum", "a": 0}
    weights = WeightFunction({1: first, 2: later}.get)
    assert [weights.values(1), weights.values(2)] == [[2.0, 3], [0, 4]]
    assert weights.certain == {"b", "d"}
    assert weights.by_name(["of a", "of c"], "of rows", "ones") == {
        "a": "of a",
        "b": "of rows",
        "c": "of c",
        "d": "ones",
    }


def test_a_total_beside_its_parts_is_refused():
    text = r"count twice\. Got the term 'loss' beside 'ce', 'kl'\. Return the total alone"
    with pytest.raises(ValueError, match=text):
        check_total(["ce", "loss", "kl"])
    check_total(["loss"])
    check_total(["ce", "kl"])


@pytest.mark.parametrize("later", [{"a": None, "b": None}, {"a": 1, "b": 1}, {"a": 1}, {}])
def test_weights_that_change_their_form_are_refused(later):
    weights = WeightFunction(lambda weight: weight)
    weights.values({"a": 1, "b": None})
    with pytest.raises(
        ValueError,
        match=r"the same terms for every micro-batch, None for the same ones\. "
        r"Got \{'a': 'a weight', 'b': 'None'\} and later .*"
        r"Return 0\.0 for a term without items",
    ):
        weights.values(later)
