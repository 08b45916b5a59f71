"""Ways to make the updates of a batch in PyTorch."""

import importlib.util
from collections.abc import Callable
from functools import partial
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

# Package -> (the peer's name, the module that makes the contender).
_TRAINERS = {
    "accelerate": ("Accelerate", "torch_accelerate"),
    "lightning": ("Lightning", "torch_lightning"),
    "transformers": ("Hugging Face Trainer", "torch_transformers"),
}


def entries(case: Case) -> list[Contender | Absent]:
    """All contenders that can run a case, each with its own model."""
    if case.model == "pairs":
        return _of_pairs(case)
    found: list[Contender | Absent] = [*loops(partial(problem, case))]
    if case.model in ("CNN", "transformer"):
        found += compiled_loops(case)
    found += [trainer(package, case, problem(case)) for package in _TRAINERS]
    return found + [way for package in _TRAINERS for way in with_us(package, case, problem(case))]


def loops(make: Callable[[], Problem]) -> list[Contender]:
    """Our way, the floor, the uncut batch and the usual hand-written loop.

    Args:
        make: makes the problem; called once per contender.
    """
    return [
        _contender(VIRTUALBATCH, OURS, make(), _ours),
        _contender("forward, backward, one update", FLOOR, make(), _floor),
        _contender(WHOLE_BATCH, WHOLE, make(), _whole),
        _contender("hand-written loop", PEER, make(), _by_hand),
    ]


def _of_pairs(case: Case) -> list[Contender | Absent]:
    """The contenders for a loss that couples rows.

    For such a loss, the mean over micro-batches is another loss.
    """
    peers: list[Contender | Absent] = [
        _contender("cached gradients by hand", PEER, problem(case), _cached_gradients),
        _contender("mean of micro-batches", PEER, problem(case), _by_hand),
        trainer("accelerate", case, problem(case)),
    ]
    if importlib.util.find_spec("sentence_transformers") is None:
        peers.append(Absent("CachedMultipleNegativesRankingLoss", "sentence-transformers"))
    else:
        made = importlib.import_module("virtualbatch.bench.torch_sentence_transformers")
        peers.append(made.contender(case, problem(case)))
    return [
        _contender(VIRTUALBATCH, OURS, problem(case), _by_rows),
        _contender("forward, backward, one update", FLOOR, problem(case), _floor),
        _contender(WHOLE_BATCH, WHOLE, problem(case), _whole),
        *peers,
    ]


def trainer(package: str, case: Case, given: Problem) -> Contender | Absent:
    """A peer that trains with another package, which may not be installed."""
    name, module = _TRAINERS[package]
    if importlib.util.find_spec(package) is None:
        return Absent(name, package)
    return importlib.import_module(f"virtualbatch.bench.{module}").contender(name, case, given)


def with_us(package: str, case: Case, given: Problem) -> list[Contender]:
    """The loop of a package with our line in it; empty if the package is not installed."""
    name, module = _TRAINERS[package]
    if importlib.util.find_spec(package) is None:
        return []
    made = importlib.import_module(f"virtualbatch.bench.{module}")
    return [made.with_us(f"{VIRTUALBATCH} in {name}", case, given)]


def captured_loop(case: Case) -> Contender:
    """Our way on a GPU, with micro-batches replayed as a CUDA graph."""
    return _contender(f"{VIRTUALBATCH}, captured", OURS, problem(case, "cuda"), _captured)


def compiled_loops(case: Case) -> list[Contender]:
    """Our way and a hand-written loop, with a micro-batch's forward and backward compiled."""
    found = []
    for beginning, role, make in (
        (VIRTUALBATCH, OURS, _ours),
        ("hand-written loop", PEER, _by_hand),
    ):
        given = problem(case)
        # Without dynamic=False, the second model of the same code would be compiled for changing
        # shapes.
        compiled = torch.compile(given.loss, dynamic=False)
        found.append(
            _contender(f"{beginning}, torch.compile", role, given._replace(loss=compiled), make)
        )
    return found


def weights_of(model: torch.nn.Module) -> Callable[[], Any]:
    """A function that copies the weights of a model to NumPy arrays."""
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


def _by_rows(given: Problem) -> Callable[[], Any]:
    encode = vb.rowwise(given.model, microbatch_size=len(given.pieces[0][0]))
    return _whole(given._replace(loss=lambda _, batch: given.loss(encode, batch)))


def _cached_gradients(given: Problem) -> Callable[[], Any]:
    """The method of GradCache.

    It computes embeddings without a graph, then their gradients, then each embedding again.

    https://arxiv.org/abs/2101.06983
    """
    model, size = given.model, len(given.pieces[0][0])

    def update() -> torch.Tensor:
        given.optimizer.zero_grad()
        cut = [view.split(size) for view in given.batch]
        with torch.no_grad():
            found = [torch.cat([model(piece) for piece in pieces]) for pieces in cut]
        for embeddings in found:
            embeddings.requires_grad_()
        loss = given.loss(lambda embeddings: embeddings, found)
        loss.backward()
        for pieces, embeddings in zip(cut, found, strict=True):
            for piece, gradient in zip(pieces, embeddings.grad.split(size), strict=True):
                (model(piece) * gradient).sum().backward()
        given.optimizer.step()
        return loss.detach()

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
    """A correct loop: each loss is scaled by the micro-batch's share of the weight."""
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
