"""Ways of making the updates of a batch in PyTorch."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

import virtualbatch.torch as vb
from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import (
    FLOOR,
    OURS,
    PEER,
    VIRTUALBATCH,
    WHOLE,
    WHOLE_BATCH,
    Absent,
    Contender,
    looped,
)
from virtualbatch.bench.torch_models import Problem, problem


def entries(case: Case) -> list[Contender | Absent]:
    """Everybody who can run a case, each with a model of its own."""
    found: list[Contender | Absent] = [
        _contender(VIRTUALBATCH, OURS, problem(case), _ours),
        _contender("forward, backward, one update", FLOOR, problem(case), _floor),
        _contender(WHOLE_BATCH, WHOLE, problem(case), _whole),
        _contender("hand-written loop", PEER, problem(case), _by_hand),
    ]
    if case.model in ("CNN", "transformer"):
        found += [
            _contender(f"{VIRTUALBATCH}, torch.compile", OURS, _compiled(problem(case)), _ours),
            _contender(
                "hand-written loop, torch.compile", PEER, _compiled(problem(case)), _by_hand
            ),
        ]
    for name, package, makers in (
        ("Accelerate", "accelerate", "torch_accelerate"),
        ("Lightning", "lightning", "torch_lightning"),
        ("Hugging Face Trainer", "transformers", "torch_transformers"),
    ):
        if importlib.util.find_spec(package) is None:
            found.append(Absent(name, package))
            continue
        module = importlib.import_module(f"virtualbatch.bench.{makers}")
        found.append(module.contender(name, case, problem(case)))
    return found


def weights_of(model: torch.nn.Module) -> Callable[[], Any]:
    """The weights of a model as arrays of their own."""
    return lambda: [parameter.detach().numpy().copy() for parameter in model.parameters()]


def _contender(
    name: str, role: str, given: Problem, make: Callable[[Problem], Callable[[], Any]]
) -> Contender:
    return Contender(name, role, looped(make(given), float), weights_of(given.model))


def _compiled(given: Problem) -> Problem:
    """The same with forward and backward of a micro-batch compiled."""
    # The same code compiled for a second model would else count as one for changing shapes.
    return given._replace(loss=torch.compile(given.loss, dynamic=False))


def _ours(given: Problem) -> Callable[[], Any]:
    rows = len(given.pieces[0][0])

    def loss(batch: Any) -> torch.Tensor:
        return given.loss(given.model, batch)

    def update() -> torch.Tensor:
        given.optimizer.zero_grad()
        found = vb.backward(
            loss, given.batch, module=given.model, microbatch_size=rows, weight=given.weight
        )
        given.optimizer.step()
        return found

    return update


def _floor(given: Problem) -> Callable[[], Any]:
    def update() -> torch.Tensor:
        given.optimizer.zero_grad()
        for piece in given.pieces:
            loss = given.loss(given.model, piece)
            loss.backward()
        given.optimizer.step()
        return loss.detach()

    return update


def _whole(given: Problem) -> Callable[[], Any]:
    def update() -> torch.Tensor:
        given.optimizer.zero_grad()
        loss = given.loss(given.model, given.batch)
        loss.backward()
        given.optimizer.step()
        return loss.detach()

    return update


def _by_hand(given: Problem) -> Callable[[], Any]:
    """A loop that is right: each loss is scaled by its part of the weight."""
    size = len(given.pieces[0][0])

    def update() -> Any:
        given.optimizer.zero_grad()
        x, y = given.batch
        everything = len(x) if given.weight is None else given.weight(given.batch)
        total: Any = 0.0
        for start in range(0, len(x), size):
            piece = x[start : start + size], y[start : start + size]
            part = len(piece[0]) if given.weight is None else given.weight(piece)
            loss = given.loss(given.model, piece) * (part / everything)
            loss.backward()
            total += loss.detach()
        given.optimizer.step()
        return total

    return update
