"""What the PyTorch engine costs beside the loop written by hand, and beside Accelerate.

The same update of 8 micro-batches of 32, in turns in one process: our call; the plain loop, which
scales each micro-batch's loss by its part of the rows; Accelerate's `accumulate`, if it is
installed; and the whole batch. Each does `zero_grad`, its gradients and one SGD update.

Usage: python benchmarks/torch_loop.py [--models MLP CNN] [--rounds 100] [--json FILE]
"""

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import virtualbatch.torch as vb

MICROBATCH_SIZE, ACCUMULATION_STEPS = 32, 8
ROWS = MICROBATCH_SIZE * ACCUMULATION_STEPS


def mlp(width: int) -> nn.Module:
    """Three dense layers on 64 features; small ones take no longer than what surrounds them."""
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(norm: type[nn.Module] = nn.Identity) -> nn.Module:
    """Three small convolutions on 16 x 16 images: the time is mostly arithmetic."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), norm(32), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(32, 32, 3), norm(32), nn.ReLU(), nn.Flatten()),
        nn.Linear(32 * 36, 10),
    )


class Transformer(nn.Module):
    """Two blocks of attention on 32 tokens of 64 features: many small operations."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: mlp(128), (64,)),
    "wide MLP": (lambda: mlp(1024), (64,)),
    "CNN": (cnn, (1, 16, 16)),
    "CNN with BatchNorm": (lambda: cnn(nn.BatchNorm2d), (1, 16, 16)),
    "transformer": (Transformer, (32, 64)),
}


class Problem:
    """A model with an optimizer and one batch."""

    def __init__(self, name: str, device: str):
        torch.manual_seed(0)
        make, shape = MODELS[name]
        self.model = make().to(device)
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.x = torch.randn(ROWS, *shape, device=device)
        self.y = torch.randint(10, (ROWS,), device=device)

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def pieces(self) -> Any:
        for start in range(0, ROWS, MICROBATCH_SIZE):
            stop = start + MICROBATCH_SIZE
            yield self.x[start:stop], self.y[start:stop]


def ours(problem: Problem) -> Callable[[], Any]:
    def update() -> torch.Tensor:
        problem.optimizer.zero_grad()
        loss = vb.backward(
            problem.loss,
            (problem.x, problem.y),
            module=problem.model,
            microbatch_size=MICROBATCH_SIZE,
        )
        problem.optimizer.step()
        return loss

    return update


def plain(problem: Problem) -> Callable[[], Any]:
    def update() -> Any:
        problem.optimizer.zero_grad()
        total: Any = 0.0
        for piece in problem.pieces():
            loss = problem.loss(piece) * (len(piece[0]) / ROWS)
            loss.backward()
            total += loss.detach()
        problem.optimizer.step()
        return total

    return update


def whole(problem: Problem) -> Callable[[], Any]:
    def update() -> torch.Tensor:
        problem.optimizer.zero_grad()
        loss = problem.loss((problem.x, problem.y))
        loss.backward()
        problem.optimizer.step()
        return loss.detach()

    return update


def accelerate(problem: Problem) -> Callable[[], Any]:
    """Its documented loop, which is right for micro-batches of equal rows."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=problem.x.device.type == "cpu")
    problem.model, problem.optimizer = accelerator.prepare(problem.model, problem.optimizer)

    def update() -> Any:
        # All Accelerators share this number, and ours refuses to run beside one above 1.
        accelerator.gradient_accumulation_steps = ACCUMULATION_STEPS
        total: Any = 0.0
        for piece in problem.pieces():
            with accelerator.accumulate(problem.model):
                loss = problem.loss(piece)
                accelerator.backward(loss)
                problem.optimizer.step()
                problem.optimizer.zero_grad()
            total += loss.detach()
        accelerator.gradient_accumulation_steps = 1
        return total / ACCUMULATION_STEPS

    return update


def ways(name: str, device: str) -> dict[str, Callable[[], Any]]:
    """Every way of doing the update, each on a model of its own."""
    problem = Problem(name, device)
    makers = {"virtualbatch": ours, "plain loop": plain, "whole batch at once": whole}
    if importlib.util.find_spec("accelerate"):
        makers["Accelerate"] = accelerate
    return {label: make(copy.deepcopy(problem)) for label, make in makers.items()}


def check(runs: dict[str, Callable[[], Any]], updates: int = 5) -> None:
    """Raises unless all ways have the same losses, update after update."""
    for _ in range(updates):
        losses = [float(run()) for run in runs.values()]
        np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


def measure(name: str, rounds: int, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each way, and the median ratio of ours to each other one."""
    runs = ways(name, device)
    # With BatchNorm, the whole batch is normalised by itself.
    check({label: run for label, run in runs.items() if label != "whole batch at once"})
    times: dict[str, list[float]] = {label: [] for label in runs}
    for turn in range(rounds):
        # Whoever comes first in a round may find other caches.
        for label in sorted(runs, reverse=bool(turn % 2)):
            start = time.perf_counter()
            float(runs[label]())
            times[label].append((time.perf_counter() - start) * 1e3)
    mine = times["virtualbatch"]
    return (
        {label: float(np.median(found)) for label, found in times.items()},
        {label: float(np.median(np.divide(mine, found))) for label, found in times.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Threads that wait for each other on a shared machine measure the machine.
    torch.set_num_threads(arguments.threads)
    if not importlib.util.find_spec("accelerate"):
        print("Accelerate is not installed and not compared: pip install accelerate")
    result = {}
    for name in arguments.models:
        found, ratios = measure(name, arguments.rounds, arguments.device)
        result[name] = {"ms": found, "ours_to": ratios}
        print(f"\n{name}: {ACCUMULATION_STEPS} micro-batches of {MICROBATCH_SIZE}")
        for label, milliseconds in found.items():
            print(f"{label:20} {milliseconds:8.2f} ms   ours / this {ratios[label]:6.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
