"""Optimizers in the backward pass, which would step at every micro-batch."""

import gc
import weakref

import pytest
import torch
from torch import nn

import virtualbatch.torch as vb

X = torch.ones(2, 1)


def weight_of_one():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def node_of(parameter):
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


def stepping(parameter):
    """A hook that makes an update of SGD and drops the gradient."""

    def hook(*_):
        with torch.no_grad():
            parameter.sub_(0.25 * parameter.grad)
        parameter.grad = None

    return hook


def window(model):
    return vb.backward(lambda x: model(x).square().mean(), X, module=model, microbatch_size=1)


def test_a_hook_on_the_node_that_adds_to_grad():
    model = weight_of_one()
    node = node_of(model.weight)
    handle = node.register_hook(stepping(model.weight))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Got a hook on the AccumulateGrad node of one of sh"):
            window(model)
    assert model.weight.item() == 1.0
    assert model.weight.grad is None
    handle.remove()
    window(model)
    assert float(model.weight.grad) == 2.0


def test_a_hook_that_is_added_later_is_refused_before_grad_is_written():
    model = weight_of_one()
    window(model)
    kept = model.weight.grad
    node = node_of(model.weight)
    node.register_hook(stepping(model.weight))
    with pytest.raises(ValueError, match=r"Got a backward pass that changed one of shape \(1, 1\)"):
        window(model)
    assert model.weight.grad is kept
    assert float(kept) == 2.0


def test_an_optimizer_in_a_hook_on_the_gradient():
    model = weight_of_one()

    def hook(gradient):
        with torch.no_grad():
            model.weight.sub_(0.25 * gradient)

    model.weight.register_hook(hook)
    with pytest.raises(
        ValueError, match=r"changed one of shape \(1, 1\)\. Remove the hook, and st"
    ):
        window(model)
    assert model.weight.grad is None


def test_a_parameter_may_change_in_the_forward_pass():
    # An embedding brings its rows to their largest norm.
    table = nn.Embedding(3, 2, max_norm=0.1)
    vb.backward(
        lambda ids: table(ids).mean(), torch.tensor([0, 1, 2]), module=table, microbatch_size=1
    )
    assert table.weight.grad is not None


def test_looking_for_hooks_keeps_nothing_alive():
    model = weight_of_one()
    gone = weakref.ref(model.weight)
    window(model)
    del model
    gc.collect()
    assert gone() is None
