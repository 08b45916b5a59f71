"""Tensors that are trained and that no module holds, given as `module`."""

from functools import partial

import pytest
import torch
from torch import nn

import virtualbatch.torch as vb

X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def tensors():
    return [
        torch.tensor([[0.5], [-1.0]], dtype=torch.float64, requires_grad=True),
        torch.zeros(1, dtype=torch.float64, requires_grad=True),
    ]


@pytest.mark.parametrize("kind", ["tensors", "generator", "mixed", "one"])
def test_gradients_of_tensors_are_those_of_the_whole_batch(kind):
    w, b = tensors()
    model = nn.Linear(2, 2, dtype=torch.float64)
    hidden = model if kind == "mixed" else nn.Identity()
    module = {
        "tensors": [w, b],
        "generator": (x for x in (w, b)),
        "mixed": [w, model, b],
        "one": w,
    }[kind]
    trained = [w] if kind == "one" else [w, b, *hidden.parameters()]

    def loss_fn(x):
        return (hidden(x) @ w + b).square().mean()

    vb.backward(loss_fn, X, module=module, microbatch_size=2)
    found = [x.grad for x in trained]
    due = torch.autograd.grad(loss_fn(X), trained)
    torch.testing.assert_close(found, list(due), rtol=1e-12, atol=1e-14)


def test_nothing_is_left_on_tensors_by_plan_and_certify(untimed_plans):
    w, b = tensors()
    w.grad = torch.ones_like(w)
    before = w.detach().clone()

    def loss_fn(x):
        return (x @ w + b).square().mean()

    assert vb.plan(loss_fn, X, module=[w, b]).microbatch_size >= 1
    found = vb.certify(loss_fn, X, module=[w, nn.Linear(1, 1), b], microbatch_size=2)
    assert found.exact
    assert {"module[0].tensor", "module[2].tensor"} <= set(found.parameters)
    assert torch.equal(w, before)
    assert torch.equal(w.grad, torch.ones_like(w))
    assert b.grad is None


def test_a_smaller_size_is_kept_for_a_tensor():
    w, _ = tensors()
    calls = []

    def loss_fn(x):
        calls.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (x @ w).square().mean()

    for _ in range(2):
        vb.backward(loss_fn, X, module=[w], microbatch_size=6)
    assert calls == [6, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda w: w * 2, r"Got one of shape \(2, 1\) computed from others\. Pass the tensors"),
        (torch.Tensor.detach, r"Got one of shape \(2, 1\) that takes no gradient\."),
    ],
    ids=["no leaf", "no gradient"],
)
def test_a_tensor_must_be_a_leaf_that_takes_a_gradient(make, text):
    w, _ = tensors()
    with pytest.raises(ValueError, match=text):
        vb.backward(
            lambda x: (x @ w).mean(), X, module=[nn.Linear(1, 1), make(w)], microbatch_size=2
        )
    assert w.grad is None


def test_parameters_of_a_module_are_no_module():
    # Its BatchNorm layers would not be seen.
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"Got its parameters\(\)\. Pass the model\."):
        vb.backward(lambda x: model(x).mean(), X, module=model.parameters(), microbatch_size=2)


def test_plan_takes_nothing_of_tensors_that_a_loss_reaches_otherwise(untimed_plans):
    # Under fake tensors, PyTorch gives even these a fake gradient.
    w, b = tensors()
    vb.plan(lambda x: (x @ w + b).square().mean(), X, module=[w])
    assert b.grad is None
    model = nn.Linear(1, 1, dtype=torch.float64)
    for ask in (vb.plan, partial(vb.certify, microbatch_size=2)):
        with pytest.raises(ValueError, match="that is in no module"):
            ask(lambda x: model(x @ w).mean(), X, module=[w])
    assert model.weight.grad is None
