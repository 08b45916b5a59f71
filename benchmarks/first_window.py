"""What it costs that the first window of a loss proves itself, in PyTorch.

Of each model: the first window with and without the check, each of a fresh model, and the later
windows of one model in turns, with and without it. Later windows only ask whether their loss is
known.

Usage: python benchmarks/first_window.py [--models MLP CNN] [--rounds 200] [--json FILE]
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from command import parser_of, save

import virtualbatch.torch as vb
from virtualbatch.bench.case import Case
from virtualbatch.bench.torch_models import Problem, problem

MODELS = ["MLP", "CNN", "transformer"]
FRESH = 7


def window(given: Problem, check: bool) -> Callable[[], float]:
    """Seconds of one window of a problem."""
    size = len(given.pieces[0][0])

    def loss_fn(batch):
        return given.loss(given.model, batch)

    def timed() -> float:
        given.optimizer.zero_grad()
        start = perf_counter()
        vb.backward(
            loss_fn,
            given.batch,
            module=given.model,
            microbatch_size=size,
            weight=given.weight,
            check=check,
        )
        return perf_counter() - start

    return timed


def measured(name: str, rounds: int) -> dict[str, float]:
    case = Case("torch", name)
    first = {check: [] for check in (True, False)}
    window(problem(case), True)()  # what a process does once
    for _ in range(FRESH):
        for check, seconds in first.items():
            seconds.append(window(problem(case), check)())
    given = problem(case)
    checked, unchecked = window(given, True), window(given, False)
    checked()
    pairs = [(checked(), unchecked()) for _ in range(rounds)]
    return {
        "first window, ms": 1e3 * median(first[True]),
        "without the check, ms": 1e3 * median(first[False]),
        "later windows, with / without": median(a / b for a, b in pairs),
    }


def main() -> None:
    arguments = parser_of(__doc__, models=MODELS, rounds=200, threads=1).parse_args()
    torch.set_num_threads(arguments.threads)
    result = {}
    for name in arguments.models:
        result[name] = measured(name, arguments.rounds)
        print(f"{name:12}", "   ".join(f"{k} {v:.3f}" for k, v in result[name].items()))
    save(arguments.json, result)


if __name__ == "__main__":
    main()
