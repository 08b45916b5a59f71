"""Accumulation on one of Keras' backends, beside a hand-written step and Keras' own accumulation.

Every contender makes the same updates on the same rows, 8 micro-batches of 32, by `fit`, whose
start and end are not counted. They run in one process, in interleaved rounds; the ratios are
medians over the rounds.

Usage: python benchmarks/keras_backends.py --backend torch [--models MLP CNN] [--rounds 60]
"""

import importlib
import os
from dataclasses import asdict
from functools import partial
from types import MethodType
from typing import Any

from command import parser_of, save

from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import FLOOR, PEER, Contender

# Their time over ours that the project promises.
TARGETS = {"hand-written train_step": 0.95, "gradient_accumulation_steps": 1.0}


def contenders(case: Case) -> list[Contender]:
    from virtualbatch.bench.keras_ways import contender, entries

    hand_written = importlib.import_module(f"hand_written_{case.framework}").train_step

    def by_hand(model: Any) -> None:
        step = partial(hand_written, microbatch_size=case.microbatch_size)
        model.train_step = MethodType(lambda self, *data: step(self, *data), model)

    ours, whole, built_in, *_ = (entry for entry in entries(case) if entry.role != FLOOR)
    return [ours, contender("hand-written train_step", PEER, case, by_hand), built_in, whole]


def main() -> None:
    parser = parser_of(__doc__, models=("MLP", "CNN"), rounds=60, updates=5, threads=1)
    parser.add_argument("--backend", required=True, choices=["torch", "jax"])
    arguments = parser.parse_args()
    # Read when Keras is imported. Threads that wait for each other on a shared machine measure the
    # machine.
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import keras
    from updates import measured

    result = {}
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    for name in arguments.models:
        case = Case(f"keras-{arguments.backend}", name)
        rows = measured(contenders(case), arguments.rounds, lambda _: arguments.updates)
        result[name] = [asdict(row) for row in rows]
        print(f"\n{name}: {case.accumulation_steps} micro-batches of {case.microbatch_size}")
        print(f"{'':30}{'ms an update':>14}{'over ours':>14}{'asked':>10}")
        for row in rows:
            target = f">= {TARGETS[row.name]}" if row.name in TARGETS else ""
            print(f"{row.name:30}{row.milliseconds[1]:14.2f}{row.times_ours[1]:14.3f}{target:>10}")
    save(arguments.json, result)


if __name__ == "__main__":
    main()
