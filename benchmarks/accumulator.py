"""Errors and memory of sums in bfloat16: what `accumulator_dtype="bfloat16"` costs and saves.

Each of N micro-batches gives 65,536 gradients of bfloat16: a mean of 1 with noise of 0.5, or a mean
of 0.1 with noise of 1. Their average is formed by `backward` with both sums, by a plain loop, which
adds in bfloat16 to the nearest, and with compensation (Kahan) in two buffers of bfloat16. float64
is exact. An error is the norm of the difference over that of the exact average; bias is the mean of
the difference over that of the exact average. Memory is what tensors hold above the model at the
peak, in bytes per parameter. Time is that of one addition of many gradients to their sums.

Usage: python benchmarks/accumulator.py [--json FILE]
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from command import parser_of, save

import virtualbatch.torch as vb
from virtualbatch.torch._plan.peak import peak_bytes
from virtualbatch.torch._rounding import StochasticRounding

NUMBERS = 2**16
MICROBATCHES = [2, 8, 64, 1024]
KINDS = {"mean 1, noise 0.5": (1.0, 0.5), "mean 0.1, noise 1": (0.1, 1.0)}
LAYERS, WIDTH, ROWS, SIZE = 16, 1024, 32, 8
ADDED = 2**24


class Weights(torch.nn.Module):
    """Parameters of bfloat16 whose gradient is the mean of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(NUMBERS, dtype=torch.bfloat16))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows * self.weights).sum(1).float().mean()


def by_backward(rows: torch.Tensor, accumulator_dtype: str) -> torch.Tensor:
    model = Weights()
    vb.backward(
        model,
        rows,
        module=model,
        microbatch_size=1,
        check=False,
        accumulator_dtype=accumulator_dtype,
    )
    return _gradient(model)


def by_plain_loop(rows: torch.Tensor) -> torch.Tensor:
    model = Weights()
    for row in rows:
        (model(row[None]) / len(rows)).backward()
    return _gradient(model)


def compensated(rows: torch.Tensor) -> torch.Tensor:
    total, lost = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
    for row in rows:
        term = row / len(rows) - lost
        new = total + term
        lost = (new - total) - term
        total = new
    return total


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32, rounded once": lambda rows: by_backward(rows, "float32"),
    "bfloat16, stochastic": lambda rows: by_backward(rows, "bfloat16"),
    "bfloat16, compensated": compensated,
    "bfloat16, nearest (plain loop)": by_plain_loop,
}


def errors() -> list[dict[str, Any]]:
    found = []
    for kind, (mean, noise) in KINDS.items():
        for count in MICROBATCHES:
            torch.manual_seed(count)
            rows = (mean + noise * torch.randn(count, NUMBERS)).bfloat16()
            exact = rows.double().mean(0)
            for way, average in WAYS.items():
                off = average(rows).double() - exact
                error = float(off.norm() / exact.norm())
                bias = float(off.mean() / exact.mean())
                row = {"kind": kind, "n": count, "way": way, "error": error, "bias": bias}
                found.append(row)
                print(f"{kind:18} {count:5} {way:31} error {error:.1e}  bias {bias:+.1e}")
    return found


def memory() -> list[dict[str, Any]]:
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    module = torch.nn.Sequential(*layers).bfloat16()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    batch = torch.randn(ROWS, WIDTH).bfloat16()

    def loss_fn(rows: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = module(rows).float().square().mean()
        return loss

    def plain() -> None:
        for rows in batch.split(SIZE):
            (loss_fn(rows) * SIZE / ROWS).backward()

    def in_window(dtype: str) -> None:
        vb.backward(
            loss_fn,
            batch,
            module=module,
            microbatch_size=SIZE,
            check=False,
            accumulator_dtype=dtype,
        )

    def behind_loss(dtype: str) -> None:
        vb.loss(
            loss_fn,
            batch,
            module=module,
            microbatch_size=SIZE,
            check=False,
            accumulator_dtype=dtype,
        ).backward()

    found = []
    for way, run in (
        ("plain loop", plain),
        ("backward, float32", lambda: in_window("float32")),
        ("backward, bfloat16", lambda: in_window("bfloat16")),
        ("loss, float32", lambda: behind_loss("float32")),
        ("loss, bfloat16", lambda: behind_loss("bfloat16")),
    ):
        module.zero_grad()
        peak = peak_bytes(run) / parameters
        found.append({"way": way, "bytes_per_parameter": peak})
        print(f"{way:20} {peak:.1f} bytes a parameter")
    return found


def times() -> dict[str, float]:
    gradient = torch.randn(ADDED).bfloat16()
    wide, narrow = torch.zeros(ADDED), torch.zeros_like(gradient)
    rounding = StochasticRounding(1)
    ways: dict[str, Callable[[], object]] = {
        "float32": lambda: wide.add_(gradient, alpha=0.1),
        "bfloat16": lambda: rounding.add(narrow, gradient, 0.1),
    }
    found = dict.fromkeys(ways, float("inf"))
    # In turns, since others use this machine.
    for _ in range(10):
        for way, add in ways.items():
            began = time.perf_counter()
            add()
            found[way] = min(found[way], time.perf_counter() - began)
    for way, seconds in found.items():
        print(f"{way:20} {1e9 * seconds / ADDED:.1f} ns a number")
    return found


def _gradient(model: Weights) -> torch.Tensor:
    if model.weights.grad is None:
        raise ValueError("internal: a window has left no gradient.")
    return model.weights.grad


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    save(arguments.json, {"errors": errors(), "memory": memory(), "times": times()})


if __name__ == "__main__":
    main()
