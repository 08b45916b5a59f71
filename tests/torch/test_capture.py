"""Captured loss functions where there is no CUDA device; tests/gpu has the rest."""

import functools
import inspect

import pytest
import torch
from torch import nn

import virtualbatch.torch as vb


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    return model, lambda x: model(x).square().mean()


def window(model, loss_fn, x, **options):
    torch.manual_seed(1)
    model.zero_grad()
    loss = vb.backward(loss_fn, x, module=model, microbatch_size=5, **options)
    return [*loss] if isinstance(loss, tuple) else [loss, *(p.grad for p in model.parameters())]


def test_windows_run_as_ever_and_one_line_says_why(caplog):
    model, loss_fn = problem()
    captured, x = vb.captured(loss_fn), torch.randn(12, 4, dtype=torch.float64)
    for _ in range(4):
        found, due = window(model, captured, x), window(model, loss_fn, x)
        assert all(map(torch.equal, found, due))
    assert caplog.text.count("not captured as CUDA graphs: the parameters are on no CUDA") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stats": True}, "stats is set"),
        ({"backward_fn": lambda loss: loss.backward()}, "there is a backward_fn"),
    ],
    ids=["stats", "backward_fn"],
)
def test_options_that_graphs_do_not_have_are_told(options, reason, caplog):
    model, loss_fn = problem()
    captured, x = vb.captured(loss_fn), torch.randn(12, 4, dtype=torch.float64)
    for _ in range(3):
        window(model, captured, x, **options)
    assert caplog.text.count(reason) == 1


def test_it_is_the_loss_function_to_everybody_else(quick_plans):
    model, loss_fn = problem()
    model.eval()
    captured, x = vb.captured(loss_fn), torch.randn(12, 4, dtype=torch.float64)
    assert torch.equal(captured(x), loss_fn(x))
    assert vb.certify(captured, x, module=model, microbatch_size=5).exact
    assert vb.plan(captured, x, module=model).microbatch_size >= 1


def test_it_has_the_name_docstring_and_signature_of_the_loss_function():
    def next_token(batch: dict, smoothing: float = 0.1) -> torch.Tensor:
        """Cross-entropy of the next token."""

    captured = vb.captured(next_token)
    assert captured.__name__ == "next_token"
    assert captured.__qualname__ == next_token.__qualname__
    assert captured.__module__ == __name__
    assert inspect.getdoc(captured) == "Cross-entropy of the next token."
    assert inspect.signature(captured) == inspect.signature(next_token)
    assert inspect.unwrap(captured) is next_token


@pytest.mark.parametrize("loss_fn", [nn.Flatten(0), functools.partial(torch.mean, dim=0)])
def test_a_loss_function_without_a_name(loss_fn):
    captured = vb.captured(loss_fn)
    assert not hasattr(captured, "__name__")
    assert not hasattr(captured, "training")
    assert captured(torch.ones(4)).sum() in (1, 4)
