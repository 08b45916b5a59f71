"""PyTorch on a GPU: ours beside the loop written by hand and the floor, in interleaved rounds.

A small CNN and a transformer, 8 micro-batches of 1 to 128 rows; each as it is, and with
`virtualbatch.torch.captured`. Then a wider transformer in bfloat16 autocast, both ways too.

Usage: python benchmarks/gpu.py [--rounds 15] [--json FILE]
"""

from dataclasses import asdict
from functools import partial

import torch
from command import parser_of, save

from virtualbatch.bench.case import Case
from virtualbatch.bench.comparison import compared, lasting
from virtualbatch.bench.contender import FLOOR, OURS
from virtualbatch.bench.result import Row
from virtualbatch.bench.torch_models import problem
from virtualbatch.bench.torch_ways import captured_loop, loops

SIZES = (1, 2, 4, 32, 128)
STEPS = 8
# Wide enough to be bound by arithmetic.
BF16_ROWS, BF16_SCALE = 128, 16
SECONDS_PER_ROUND = 0.1


def measure(case: Case, rounds: int) -> list[Row]:
    contenders = [*loops(partial(problem, case, "cuda")), captured_loop(case)]
    return compared([contenders], rounds, lasting(SECONDS_PER_ROUND))[0]


def report(title: str, rows: list[Row], judged: bool = True) -> None:
    print(f"\n{title}\n{'':50}{'ms':>9}{'x our time':>12}{'  result' if judged else ''}")
    for row in rows:
        milliseconds, times_ours = row.milliseconds[1], row.times_ours[1]
        verdict = f"  {row.verdict}" if judged else ""
        print(f"{row.name:50}{milliseconds:9.3f}{times_ours:12.2f}{verdict}")


def bf16(rounds: int) -> list[Row]:
    case = Case("torch", "transformer", BF16_ROWS, STEPS, BF16_SCALE)
    # Rounding to 8 bits moves an update by more than a comparison in float32 allows: it is shown
    # and not judged.
    with torch.autocast("cuda", torch.bfloat16):
        return measure(case, rounds)


def main() -> None:
    parser = parser_of(__doc__, rounds=15)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed. Got none.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    result = {}
    for model in ("CNN", "transformer"):
        for size in SIZES:
            rows = measure(Case("torch", model, size, STEPS), arguments.rounds)
            title = f"{model}, {STEPS} micro-batches of {size}"
            result[title] = [asdict(row) for row in rows]
            report(title, rows)
    rows = bf16(arguments.rounds)
    title = f"transformer x {BF16_SCALE} in bfloat16, {STEPS} micro-batches of {BF16_ROWS}"
    result[title] = [asdict(row) for row in rows]
    report(title, rows, judged=False)
    floor = next(row.milliseconds[1] for row in rows if row.role == FLOOR)
    for row in rows:
        if row.role == OURS:
            print(f"{row.name} over the floor in bfloat16: {row.milliseconds[1] / floor:.3f}")
    save(arguments.json, result)


if __name__ == "__main__":
    main()
