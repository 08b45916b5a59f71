"""What the loop over micro-batches costs, without `fit` around it.

The same gradient of 8 micro-batches of 32, four ways, in interleaved rounds in one process: our
loop; the loop written out as one graph (its memory grows with the number of micro-batches); the
compiled step called 8 times from Python; and the whole batch at once.

Usage: python benchmarks/loop.py [--models MLP CNN] [--rounds 60] [--json FILE]
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
import tensorflow as tf
from command import parser_of, save

import virtualbatch.tensorflow as vb
from virtualbatch.bench.case import Case
from virtualbatch.bench.rounds import in_rounds, seconds_of
from virtualbatch.bench.tensorflow_ways import problem


def ways(case: Case) -> dict[str, Callable[[], Any]]:
    given = problem(case)

    def gradients(part: Any) -> list[tf.Tensor]:
        return given.gradients(part)[1]

    def added(parts: Any, step: Callable[[Any], list[tf.Tensor]]) -> list[tf.Tensor]:
        total = step(parts[0])
        for part in parts[1:]:
            total = [a + b for a, b in zip(total, step(part), strict=True)]
        return total

    def accumulated(batch: Any) -> list[tf.Tensor]:
        return vb.value_and_gradients(
            given.loss,
            batch,
            given.model.trainable_variables,
            microbatch_size=case.microbatch_size,
        )[1]

    ours, step = tf.function(accumulated), tf.function(gradients)
    written_out = tf.function(lambda parts: added(parts, gradients))
    return {
        "virtualbatch": lambda: ours(given.batch),
        "written out in one graph": lambda: written_out(given.pieces),
        "compiled step, 8 calls": lambda: added(given.pieces, step),
        "whole batch at once": lambda: step(given.batch),
    }


def main() -> None:
    arguments = parser_of(__doc__, models=("MLP", "CNN"), rounds=60).parse_args()
    result = {}
    for name in arguments.models:
        case = Case("tensorflow", name)
        runs = {label: partial(seconds_of, run) for label, run in ways(case).items()}
        # What is compiled is compiled here.
        in_rounds(runs, 1)
        times = in_rounds(runs, arguments.rounds)
        found = result[name] = {label: np.median(times[label]) * 1e3 for label in runs}
        print(f"\n{name}: {case.accumulation_steps} micro-batches of {case.microbatch_size}")
        for label, milliseconds in found.items():
            ratio = milliseconds / found["virtualbatch"]
            print(f"{label:28} {milliseconds:8.2f} ms {ratio:6.2f} x ours")
    save(arguments.json, {"ms": result})


if __name__ == "__main__":
    main()
