"""What the PyTorch engine costs beside the loop that one would write by hand.

The same gradient of 8 micro-batches of 32, three ways, in turns in one process: our call; the
plain loop, which scales each micro-batch's loss by its part of the rows; and the whole batch.

Usage: python benchmarks/torch_loop.py [--models MLP CNN] [--rounds 100] [--json FILE]
"""

import argparse
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


def mlp() -> nn.Module:
    """Three small dense layers on 64 features: the time is mostly overhead."""
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


def cnn(norm: type[nn.Module] = nn.Identity) -> nn.Module:
    """Three small convolutions on 16 x 16 images: the time is mostly arithmetic."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), norm(32), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(32, 32, 3), norm(32), nn.ReLU(), nn.Flatten()),
        nn.Linear(32 * 36, 10),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (64,)),
    "CNN": (cnn, (1, 16, 16)),
    "CNN with BatchNorm": (lambda: cnn(nn.BatchNorm2d), (1, 16, 16)),
}


def ways(name: str, device: str) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(device)
    rows = MICROBATCH_SIZE * ACCUMULATION_STEPS
    x = torch.randn(rows, *shape, device=device)
    y = torch.randint(10, (rows,), device=device)

    def loss_fn(batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def ours() -> torch.Tensor:
        model.zero_grad()
        return vb.backward(loss_fn, (x, y), module=model, microbatch_size=MICROBATCH_SIZE)

    def plain() -> Any:
        model.zero_grad()
        total: Any = 0.0
        for i in range(0, rows, MICROBATCH_SIZE):
            part = (x[i : i + MICROBATCH_SIZE], y[i : i + MICROBATCH_SIZE])
            loss = loss_fn(part) * (len(part[0]) / rows)
            loss.backward()
            total += loss.detach()
        return total

    def whole() -> torch.Tensor:
        model.zero_grad()
        loss = loss_fn((x, y))
        loss.backward()
        return loss.detach()

    return {"virtualbatch": ours, "plain loop": plain, "whole batch at once": whole}


def measure(name: str, rounds: int, device: str) -> tuple[dict[str, float], float]:
    """Median milliseconds of each way, and the median ratio of ours to the plain loop."""
    runs = ways(name, device)
    for run in list(runs.values()) * 5:
        run()
    times: dict[str, list[float]] = {label: [] for label in runs}
    for turn in range(rounds):
        # Whoever comes first in a round may find other caches.
        for label in sorted(runs, reverse=bool(turn % 2)):
            start = time.perf_counter()
            float(runs[label]())
            times[label].append((time.perf_counter() - start) * 1e3)
    ratios = np.divide(times["virtualbatch"], times["plain loop"])
    return {label: float(np.median(found)) for label, found in times.items()}, np.median(ratios)


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
    result = {}
    for name in arguments.models:
        found, ratio = measure(name, arguments.rounds, arguments.device)
        result[name] = {"ms": found, "ratio": float(ratio)}
        print(f"\n{name}: {ACCUMULATION_STEPS} micro-batches of {MICROBATCH_SIZE}")
        for label, milliseconds in found.items():
            print(f"{label:20} {milliseconds:8.2f} ms")
        print(f"ours / plain loop    {ratio:8.3f} (median of the rounds)")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
