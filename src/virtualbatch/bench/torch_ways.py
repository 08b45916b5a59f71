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
    found: list[Contender | Absent] = [*loops(case)]
    if case.model in ("CNN", "transformer"):
        found += compiled_loops(case)
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


def loops(case: Case, device: str = "cpu") -> list[Contender]:
    """Ours, the floor, the uncut batch and the loop that one would write."""
    return [
        _contender(VIRTUALBATCH, OURS, problem(case, device), _ours),
        _contender("forward, backward, one update", FLOOR, problem(case, device), _floor),
        _contender(WHOLE_BATCH, WHOLE, problem(case, device), _whole),
        _contender("hand-written loop", PEER, problem(case, device), _by_hand),
    ]


def captured_loop(case: Case) -> Contender:
    """Ours on a GPU, with the micro-batches replayed as a CUDA graph."""
    return _contender(f"{VIRTUALBATCH}, captured", OURS, problem(case, "cuda"), _captured)


def compiled_loops(case: Case, device: str = "cpu") -> list[Contender]:
    """Ours and a hand-written loop with forward and backward of a micro-batch compiled.

    Args:
        case: the case.
        device: of the model and the batch.
    """
    found = []
    for beginning, role, make in (
        (VIRTUALBATCH, OURS, _ours),
        ("hand-written loop", PEER, _by_hand),
    ):
        given = problem(case, device)
        # The same code compiled for a second model would else count as one for changing shapes.
        compiled = torch.compile(given.loss, dynamic=False)
        found.append(
            _contender(f"{beginning}, torch.compile", role, given._replace(loss=compiled), make)
        )
    return found


def weights_of(model: torch.nn.Module) -> Callable[[], Any]:
    """The weights of a model as arrays of their own."""
    return lambda: [parameter.detach().cpu().numpy().copy() for parameter in model.parameters()]


def _contender(
    name: str, role: str, given: Problem, make: Callable[[Problem], Callable[[], Any]]
) -> Contender:
    return Contender(name, role, looped(make(given), float), weights_of(given.model))


def _ours(given: Problem) -> Callable[[], Any]:
    return _updates(given, lambda batch: given.loss(given.model, batch))


def _captured(given: Problem) -> Callable[[], Any]:
    return _updates(given, vb.captured(lambda batch: given.loss(given.model, batch)))


def _updates(given: Problem, loss: Callable[[Any], Any]) -> Callable[[], Any]:
    rows = len(given.pieces[0][0])

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
