"""Training recipes with more than one loss or pass, whose values are those of the whole batch."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import virtualbatch.torch as vb

ROWS, SIZE = 11, 4


def batch():
    random = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 3, generator=random, dtype=torch.float64)
    return x, torch.randint(0, 4, (ROWS,), generator=random)


def mlp(outputs=1):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def assert_same(cut, whole):
    """Raises unless two modules have the same parameters and `.grad`s, to rounding."""
    for a, b in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def compared(train, model):
    """Trains two copies, with windows and without: (model, backward) -> None."""
    cut, whole = model, copy.deepcopy(model)

    def in_window(loss_fn, given, module, **options):
        return vb.backward(loss_fn, given, module=module, microbatch_size=SIZE, **options)

    def at_once(loss_fn, given, module, weight=None):
        loss = loss_fn(given)
        loss = sum(loss.values()) if isinstance(loss, dict) else loss
        loss.backward()
        return loss.detach()

    train(cut, in_window)
    train(whole, at_once)
    assert_same(cut, whole)


def lbfgs(model, backward):
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        return backward(lambda b: functional.cross_entropy(model(b[0]), b[1]), batch(), model)

    optimizer.step(closure)


def sharpness_aware(model, backward):
    """SAM: the gradient at the worst point nearby, from two windows."""
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def loss_fn(b):
        return functional.cross_entropy(model(b[0]), b[1])

    for _ in range(2):
        sgd.zero_grad()
        backward(loss_fn, batch(), model)
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            moved = [0.05 * p.grad / norm for p in model.parameters()]
            for parameter, step in zip(model.parameters(), moved, strict=True):
                parameter.add_(step)
        sgd.zero_grad()
        backward(loss_fn, batch(), model)
        with torch.no_grad():
            for parameter, step in zip(model.parameters(), moved, strict=True):
                parameter.sub_(step)
        sgd.step()


def gradient_penalty(model, backward):
    """The critic of WGAN-GP."""
    random = torch.Generator().manual_seed(2)
    real, fake, mix = (
        torch.rand(ROWS, n, generator=random, dtype=torch.float64) for n in (3, 3, 1)
    )

    def loss_fn(b):
        real, fake, mix = b
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return model(fake).mean() - model(real).mean() + 10 * penalty

    backward(loss_fn, (real, fake, mix), model)


def meta_learning(model, backward):
    """MAML: the gradient through an inner update of each task; a row is a task."""
    random = torch.Generator().manual_seed(3)
    tasks = torch.randn(ROWS, 2, 6, 3, generator=random, dtype=torch.float64)

    def after_update(task):
        def loss_of(parameters, x):
            return functional_call(model, parameters, (x,)).sub(x.sum(1, True)).square().mean()

        start = dict(model.named_parameters())
        inner = torch.func.grad(loss_of)(start, task[0])
        return loss_of({name: p - 0.1 * inner[name] for name, p in start.items()}, task[1])

    backward(lambda tasks: torch.func.vmap(after_update)(tasks).mean(), tasks, model)


def checkpointed(model, backward):
    def loss_fn(b):
        hidden = checkpoint(model[:2], b[0].clone().requires_grad_(), use_reentrant=True)
        return functional.cross_entropy(model[2](hidden), b[1])

    backward(loss_fn, batch(), model)


def class_weights(model, backward):
    """With smoothing PyTorch still divides by the class weights of the labels."""
    classes = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)

    def loss_fn(b):
        return functional.cross_entropy(model(b[0]), b[1], classes, label_smoothing=0.1)

    backward(loss_fn, batch(), model, weight=lambda b: classes[b[1]].sum())


def odds_ratio(model, backward):
    """ORPO: a mean over the tokens of chosen answers, and one over pairs."""
    random = torch.Generator().manual_seed(4)
    chosen, rejected = torch.randn(2, ROWS, 6, 3, generator=random, dtype=torch.float64)
    counts = torch.rand(ROWS, 6, generator=random) < 0.7
    counts[0] = False
    counts[0, 0] = True

    def loss_fn(b):
        good, bad = (functional.logsigmoid(model(x)[..., 0]) for x in b[:2])
        mask = b[2].double()
        odds = (good * mask).sum(1) / mask.sum(1) - bad.mean(1)
        return {
            "tokens": -(good * mask).sum() / mask.sum(),
            "pairs": -0.1 * functional.logsigmoid(odds).mean(),
        }

    backward(
        loss_fn,
        (chosen, rejected, counts),
        model,
        weight=lambda b: {"tokens": b[2].sum(), "pairs": len(b[0])},
    )


@pytest.mark.parametrize(
    ("train", "outputs"),
    [
        (lbfgs, 4),
        (sharpness_aware, 4),
        (gradient_penalty, 1),
        (meta_learning, 1),
        (checkpointed, 4),
        (class_weights, 4),
        (odds_ratio, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_recipe_in_windows_is_that_of_the_whole_batch(train, outputs):
    compared(train, mlp(outputs))


def test_a_recipe_that_is_off_is_seen():
    def of_rows(model, backward):
        def dropping(loss_fn, given, module, weight):
            return backward(loss_fn, given, module)

        class_weights(model, dropping)

    with pytest.raises(AssertionError):
        compared(of_rows, mlp(4))
