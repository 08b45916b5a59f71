"""Bad input at random: each call is right, or refused in words with nothing changed."""

import re

import pytest
import torch
from tests.fuzz import outcomes
from tests.fuzz.cases import run_case
from tests.fuzz.runner import findings, load, run, seeds

import virtualbatch.torch as vb

# Wrong losses and weights are found by first windows that prove themselves.
pytestmark = pytest.mark.proves_itself


def test_bad_input_is_refused_in_words_or_right():
    found = run(load("torch"), seeds(0, 60))
    assert not findings(found), "\n".join(map(str, findings(found)))


@pytest.mark.thorough("ten seeds of bad input")
@pytest.mark.parametrize("seed", range(10))
def test_bad_input_of_many_seeds_is_refused_in_words_or_right(seed):
    found = run(load("torch"), seeds(seed, 200))
    assert not findings(found), "\n".join(map(str, findings(found)))


NAMED = {
    "backward|batch: a graph": r"carry no graph.* Got batch\['x'\] with grad_fn=MulBackward0, comp",
    "loss|batch: a graph": r"carry no graph.* Got batch\['x'\] with grad_fn=MulBackward0, computed",
    "backward|loss: calls backward": r"leave \.grad alone.*zero_grad\(\) or backward\(\) inside",
    "loss|loss: calls backward": r"leave \.grad alone.*Got zero_grad\(\) or backward\(\) inside",
    "backward|backward_fn: nothing": r"backward_fn must compute the gradients .*no backward pass",
    "backward|batch: a tuple of a class": r"made of its parts alone.* Got Odd, which refuses",
    "backward|stats: text": r"stats must be True or False\. Got stats='no such word'\.",
    "backward|check: an array": r"check must be True or False\. Got check=array",
    "backward|accumulator_dtype: an array": r"accumulator_dtype must be .*, by name\. Got array",
    "backward|weight that is an array": r"weight must be a function of one batch\. Got weight=arr",
    "backward|weight: beyond float64": r"finite number, 0 or more\. Got one of type int that no",
    "loss|aux: more later": r"aux must have the same structure for every micro-batch\.",
    "loss|aux: shapes that change": r"one shape in every micro-batch\. Got shapes",
    "loss|module: nothing": r"at least one trainable parameter\. Got no module without any",
    "backward|loss: turns recording off": r"not leave gradient recording .*set_grad_enabled\(F",
    "rowwise|loss: turns recording off": r"not leave gradient recording .*set_grad_enabled\(",
    "certify|loss: turns recording off": r"not leave gradient recording .*set_grad_enabled\(",
    "rowwise|loss: more terms later": r"same structure for every micro-batch\. Got output\['0'\]",
    "certify|microbatch_size: 1|loss: on no device": r"certify compares values.*device meta, which",
    "certify|an automatic size": r"certify compares one cut\. Got microbatch_size=",
}


@pytest.mark.parametrize("case", NAMED)
def test_what_once_failed_obscurely_says_what_is_wrong(case):
    found = run_case(load("torch"), case)
    assert found.outcome.kind == outcomes.CLEAR, found
    assert re.search(NAMED[case], found.outcome.text), found


def test_a_window_of_the_same_module_inside_a_loss_is_refused():
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)

    def loss_fn(x):
        vb.backward(lambda rows: model(rows).mean(), x, module=model, microbatch_size=1)
        return model(x).mean()

    with pytest.raises(ValueError, match=r"leave \.grad alone.*backward\(\) inside loss_fn"):
        vb.backward(loss_fn, torch.ones(4, 2), module=model, microbatch_size=2)
    assert torch.equal(model.weight.grad, torch.ones(1, 2))
