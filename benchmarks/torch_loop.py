"""What the PyTorch engine costs beside the loop written by hand, and beside Accelerate.

The same update of 8 micro-batches of 32, in interleaved rounds in one process: our call; the plain
loop, which scales each micro-batch's loss by its part of the rows; Accelerate's `accumulate`, if it
is installed; and the whole batch. Each does `zero_grad`, its gradients and one SGD update.

Usage: python benchmarks/torch_loop.py [--models MLP CNN] [--rounds 100] [--json FILE]
"""

from dataclasses import asdict, replace
from functools import partial

import torch
from command import parser_of, save
from torch import nn
from updates import measured

from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import FLOOR, WHOLE, Absent, Contender
from virtualbatch.bench.torch_models import Problem, problem
from virtualbatch.bench.torch_ways import loops, trainer

NORMALISED = "CNN with BatchNorm"
# Small dense layers take no longer than what surrounds them.
MODELS = {
    "MLP": Case("torch", "MLP"),
    "wide MLP": Case("torch", "MLP", scale=8),
    "CNN": Case("torch", "CNN"),
    NORMALISED: Case("torch", "CNN"),
    "transformer": Case("torch", "transformer"),
}
PLAIN_LOOP = "plain loop"


def made(name: str, device: str) -> Problem:
    given = problem(MODELS[name], device)
    if name == NORMALISED:
        for block in given.model[:3]:
            block.insert(1, nn.BatchNorm2d(block[0].out_channels, device=device))
    return given._replace(optimizer=torch.optim.SGD(given.model.parameters(), 1e-3))


def contenders(name: str, device: str) -> list[Contender | Absent]:
    make = partial(made, name, device)
    ours, _, whole, by_hand = loops(make)
    by_hand = replace(by_hand, name=PLAIN_LOOP)
    if name == NORMALISED:
        # The whole batch is normalised by itself, so the loop says what is right.
        whole, by_hand = replace(whole, role=FLOOR), replace(by_hand, role=WHOLE)
    return [ours, by_hand, whole, trainer("accelerate", MODELS[name], make())]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = parser_of(__doc__, models=MODELS, rounds=100, device=device, threads=1)
    arguments = parser.parse_args()
    # Threads that wait for each other on a shared machine measure the machine.
    torch.set_num_threads(arguments.threads)
    result = {}
    for name in arguments.models:
        rows = measured(contenders(name, arguments.device), arguments.rounds)
        result[name] = [asdict(row) for row in rows]
        case = MODELS[name]
        print(f"\n{name}: {case.accumulation_steps} micro-batches of {case.microbatch_size}")
        for row in rows:
            print(f"{row.name:20} {row.milliseconds[1]:8.2f} ms {row.times_ours[1]:6.3f} of ours")
    save(arguments.json, result)


if __name__ == "__main__":
    main()
