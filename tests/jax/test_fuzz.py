"""Bad input at random: each call is right, or refused in words with nothing changed."""

import re

import pytest
from tests.fuzz import outcomes
from tests.fuzz.cases import run_case
from tests.fuzz.runner import findings, load, run, seeds

# Wrong losses and weights are found by first windows that prove themselves.
pytestmark = pytest.mark.proves_itself


def test_bad_input_is_refused_in_words_or_right():
    found = run(load("jax"), seeds(0, 20))
    assert not findings(found), "\n".join(map(str, findings(found)))


@pytest.mark.thorough("ten seeds of bad input")
@pytest.mark.parametrize("seed", range(10))
def test_bad_input_of_many_seeds_is_refused_in_words_or_right(seed):
    found = run(load("jax"), seeds(seed, 200))
    assert not findings(found), "\n".join(map(str, findings(found)))


NAMED = {
    "value_and_grad|argnums: 5": r"argnums must be .*a positional argument\. Got argnums=5 and 2",
    "plan|argnums: huge": r"argnums must be the position of a positional argument\. Got argnums=10",
    "value_and_grad|batch: a shape struct": r"must have values\. Got a jax\.ShapeDtypeStruct as",
    "rowwise|batch: a shape struct": r"Arrays must have values\. Got a jax\.ShapeDtypeStruct as",
    "certify|batch: a shape struct": r"Arrays must have values\. Got a jax\.ShapeDtypeStruct as",
    "value_and_grad|axis_name: 3": r"must name an axis of the mesh in use\. Got axis_name=3 out",
    "value_and_grad|loss: terms by mixed names": r"must be sortable.* Got \['a', 2\]\. Re",
    "plan|aux: a set": r"arrays and numbers, which a compiled program can.* leaf of type set\. Ret",
    "value_and_grad|grad_fn: grad": r"must return \(\(value, aux\), gradients\).*Got a dict in the",
    "value_and_grad|axis_name: a dict": r"a tuple of names\. Got axis_name=\{'a': 1\}\. Pass",
    "plan|params: with a function": r"hold arrays and.* Got a builtin.* at args\[0\]\['act'\]\. Cl",
    "certify|batch: an array of text": r"dtypes that JAX knows\. Got an array of <U1\. Leave it",
    "certify|loss: branches on values": r"cannot read values\. Got TracerBoolConversionError: Atte",
    "rowwise|in the batch: an object array": r"dtypes that JAX knows\. Got an array of object\. Le",
}


def test_argnums_may_be_a_list():
    found = run_case(load("jax"), "value_and_grad|argnums: a list")
    assert found.outcome.kind == outcomes.RIGHT, found


@pytest.mark.parametrize("case", NAMED)
def test_what_once_failed_obscurely_says_what_is_wrong(case):
    found = run_case(load("jax"), case)
    assert found.outcome.kind == outcomes.CLEAR, found
    assert re.search(NAMED[case], found.outcome.text), found
