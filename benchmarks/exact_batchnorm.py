"""What BatchNorm of the whole batch would cost in micro-batches: error, peak of tensors and time.

    python benchmarks/exact_batchnorm.py --layers 8
    python benchmarks/exact_batchnorm.py --layers 20

A chain of convolutions, each with a BatchNorm. Errors are those of the gradient against the uncut
batch, in its largest entry; times and peaks are parts of the uncut batch's, medians of rounds.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import virtualbatch.torch as vb
from virtualbatch.torch._plan.peak import peak_bytes

ROWS, MICROBATCH, CHANNELS, SIDE, CLASSES = 64, 8, 8, 16, 5
EPSILON, ROUNDS = 1e-5, 5
CUT = [slice(start, start + MICROBATCH) for start in range(0, ROWS, MICROBATCH)]
AXES = (0, 2, 3)


class Chain(torch.nn.Module):
    """Convolutions, each before a BatchNorm and a rectifier, and a linear head."""

    def __init__(self, layers: int):
        super().__init__()
        widths = [3] + [CHANNELS] * layers
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)
        )
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(CHANNELS) for _ in range(layers))
        self.head = torch.nn.Linear(CHANNELS, CLASSES)

    def before(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """From the output of the BatchNorm below to the input of this one."""
        return self.convolutions[layer](x if layer == 0 else F.relu(x))

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """From the output of the last BatchNorm to the share of the mean loss of all rows."""
        return F.cross_entropy(self.head(F.relu(x).mean((2, 3))), y, reduction="sum") / ROWS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in enumerate(self.norms):
            x = norm(self.before(layer, x))
        return x


class Problem(NamedTuple):
    """A chain and a batch."""

    model: Chain
    x: torch.Tensor
    y: torch.Tensor


class Known(torch.autograd.Function):
    """BatchNorm whose moments are given, and the two means of its backward pass, if they are.

    With d what arrives and h the normalised input, both of the whole batch, the gradient of the
    input is weight / deviation * (d - mean(d) - h * mean(d * h)).
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, moments: Any, means: Any, told: Any):
        mean, deviation = (along(value) for value in moments)
        normal = (x - mean) / deviation
        ctx.save_for_backward(normal, weight, deviation)
        ctx.means, ctx.told = means, told
        return normal * along(weight) + along(bias)

    @staticmethod
    def backward(ctx: Any, arriving: torch.Tensor):
        normal, weight, deviation = ctx.saved_tensors
        of_weight, of_bias = (arriving * normal).sum(AXES), arriving.sum(AXES)
        if ctx.told is not None:
            ctx.told.append((of_bias, of_weight))
        below = None
        if ctx.means is not None:
            plain, with_normal = (along(value) for value in ctx.means)
            below = (arriving - plain - normal * with_normal) * along(weight) / deviation
        return below, of_weight, of_bias, None, None, None


def along(value: torch.Tensor) -> torch.Tensor:
    """One number per channel, to be used on images."""
    return value if value.dim() == 4 else value[None, :, None, None]


def known(problem: Problem, layer: int, x: Any, moments: Any, means: Any = None, told: Any = None):
    norm = problem.model.norms[layer]
    return Known.apply(x, norm.weight, norm.bias, moments[layer], means, told)


def moments_of(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of equally large parts, (parts, 2, channels) of means and variances."""
    means, variances = torch.stack(parts).unbind(1)
    mean = means.mean(0)
    variance = variances.mean(0) + ((means - mean) ** 2).mean(0)
    return mean, (variance + EPSILON).sqrt()


def seen(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.mean(AXES), x.var(AXES, unbiased=False)])


def uncut(problem: Problem) -> None:
    model, x, y = problem
    model.loss(model(x), y).backward()


def micro_batch_statistics(problem: Problem) -> None:
    """What the library does."""
    model, x, y = problem
    vb.backward(
        lambda batch: F.cross_entropy(model.head(F.relu(model(batch[0])).mean((2, 3))), batch[1]),
        [x, y],
        module=model,
        microbatch_size=MICROBATCH,
        check=False,
    )


def all_moments(problem: Problem) -> list[Any]:
    """The moments of every layer, one pass for each."""
    found: list[Any] = []
    with torch.no_grad():
        for layer in range(len(problem.model.norms)):
            parts = []
            for rows in CUT:
                x = problem.x[rows]
                for below in range(layer):
                    x = known(problem, below, problem.model.before(below, x), found)
                parts.append(seen(problem.model.before(layer, x)))
            found.append(moments_of(parts))
    return found


def constants(problem: Problem) -> None:
    """Exact moments, treated as constants."""
    found = all_moments(problem)
    for rows in CUT:
        x = problem.x[rows]
        for layer, norm in enumerate(problem.model.norms):
            mean, deviation = (along(value) for value in found[layer])
            x = (problem.model.before(layer, x) - mean) / deviation
            x = x * along(norm.weight) + along(norm.bias)
        problem.model.loss(x, problem.y[rows]).backward()


def flat(problem: Problem) -> None:
    """Exact on the memory of a micro-batch: a pass for each layer's moments and for its means."""
    model, count = problem.model, len(problem.model.norms)
    found = all_moments(problem)
    means: list[Any] = [None] * count
    values = ROWS * SIDE * SIDE
    for layer in reversed(range(count)):
        told: list[Any] = []
        for rows in CUT:
            x = problem.x[rows]
            with torch.no_grad():
                for below in range(layer):
                    x = known(problem, below, model.before(below, x), found)
                x = model.before(layer, x)
            x = known(problem, layer, x, found, None, told)
            for above in range(layer + 1, count):
                x = known(problem, above, model.before(above, x), found, means[above])
            torch.autograd.grad(model.loss(x, problem.y[rows]), model.norms[layer].weight)
        means[layer] = [torch.stack(column).sum(0) / values for column in zip(*told, strict=True)]
    for rows in CUT:
        x = problem.x[rows]
        for layer in range(count):
            x = known(problem, layer, model.before(layer, x), found, means[layer])
        model.loss(x, problem.y[rows]).backward()


def breadth_first(problem: Problem) -> None:
    """Exact, layer by layer over all micro-batches; inputs of all BatchNorms are kept."""
    model, count = problem.model, len(problem.model.norms)
    found: list[Any] = []
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        for layer in range(count):
            pieces = []
            for rows in CUT:
                x = problem.x[rows] if not layer else kept[-1][rows]
                x = known(problem, layer - 1, x, found) if layer else x
                pieces.append(model.before(layer, x))
            kept.append(torch.cat(pieces))
            found.append(moments_of([seen(piece) for piece in pieces]))
            del pieces, x
    arriving = torch.empty_like(kept[-1])
    for rows in CUT:
        x = known(problem, count - 1, kept[-1][rows], found).detach().requires_grad_()
        model.loss(x, problem.y[rows]).backward()
        arriving[rows] = x.grad
    for layer in reversed(range(count)):
        inputs, norm = kept.pop(), model.norms[layer]
        mean, deviation = (along(value) for value in found[layer])
        with torch.no_grad():
            sums = [torch.zeros(CHANNELS), torch.zeros(CHANNELS)]
            for rows in CUT:
                normal = (inputs[rows] - mean) / deviation
                sums[0] += arriving[rows].sum(AXES)
                sums[1] += (arriving[rows] * normal).sum(AXES)
            norm.bias.grad, norm.weight.grad = sums
            plain, with_normal = (along(value / (ROWS * SIDE * SIDE)) for value in sums)
        below = torch.empty_like(kept[-1]) if layer else None
        for rows in CUT:
            with torch.no_grad():
                normal = (inputs[rows] - mean) / deviation
                of_input = arriving[rows] - plain - normal * with_normal
                of_input *= along(norm.weight) / deviation
            x = problem.x[rows]
            if layer:
                x = known(problem, layer - 1, kept[-1][rows], found).detach().requires_grad_()
            model.before(layer, x).backward(of_input)
            if below is not None:
                below[rows] = x.grad
        arriving = below


SCHEMES: dict[str, Callable[[Problem], None]] = {
    "uncut": uncut,
    "statistics of micro-batches (the library)": micro_batch_statistics,
    "exact statistics as constants": constants,
    "exact, on the memory of a micro-batch": flat,
    "exact, inputs of every BatchNorm kept": breadth_first,
}


def measured(problem: Problem, scheme: Callable[[Problem], None]) -> Iterator[Any]:
    """The gradient, the peak of tensors in bytes and the seconds of one run."""
    problem.model.zero_grad()
    yield peak_bytes(lambda: scheme(problem))
    yield torch.cat([p.grad.flatten() for p in problem.model.parameters()])
    problem.model.zero_grad()
    start = time.perf_counter()
    scheme(problem)
    yield time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 3, SIDE, SIDE), torch.randint(0, CLASSES, (ROWS,))
    problem = Problem(Chain(arguments.layers), x, y)
    print(f"{arguments.layers} BatchNorms, {ROWS} rows in micro-batches of {MICROBATCH}")
    rounds = [
        {name: tuple(measured(problem, scheme)) for name, scheme in SCHEMES.items()}
        for _ in range(ROUNDS)
    ]
    for name in SCHEMES:
        peak, gradient, _ = rounds[0][name]
        of_uncut = rounds[0]["uncut"]
        off = (gradient - of_uncut[1]).abs().max() / of_uncut[1].abs().max()
        times = statistics.median(r[name][2] / r["uncut"][2] for r in rounds)
        print(
            f"{name:42s} gradient error {off:.1e}  peak {100 * peak / of_uncut[0]:3.0f} %  "
            f"time {times:.2f}"
        )


if __name__ == "__main__":
    main()
