"""What the loop over micro-batches costs, without `fit` around it.

The same gradient of 8 micro-batches of 32, four ways, in turns in one process: our loop; the loop
written out as one graph (its memory grows with the number of micro-batches); the compiled step
called 8 times from Python; and the whole batch at once.

Usage: python benchmarks/loop.py [--models MLP CNN] [--rounds 60] [--json FILE]
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from models import MODELS, data

import virtualbatch.tensorflow as vb

MICROBATCH_SIZE, ACCUMULATION_STEPS = 32, 8


def ways(name: str) -> dict[str, Callable[[], Any]]:
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batch = tuple(map(tf.constant, data(name, MICROBATCH_SIZE * ACCUMULATION_STEPS)))
    pieces = [
        tuple(leaf[i : i + MICROBATCH_SIZE] for leaf in batch)
        for i in range(0, len(batch[0]), MICROBATCH_SIZE)
    ]

    def loss_fn(part: Any) -> tf.Tensor:
        return loss(part[1], model(part[0], training=True))

    def gradients(part: Any) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            value = loss_fn(part)
        return tape.gradient(value, model.trainable_variables)

    def added(parts: Any, step: Callable[[Any], list[tf.Tensor]]) -> list[tf.Tensor]:
        total = step(parts[0])
        for part in parts[1:]:
            total = [a + b for a, b in zip(total, step(part), strict=True)]
        return total

    def accumulated(part: Any) -> list[tf.Tensor]:
        return vb.value_and_gradients(
            loss_fn, part, model.trainable_variables, microbatch_size=MICROBATCH_SIZE
        )[1]

    ours, step = tf.function(accumulated), tf.function(gradients)
    written_out = tf.function(lambda parts: added(parts, gradients))
    return {
        "virtualbatch": lambda: ours(batch),
        "written out in one graph": lambda: written_out(pieces),
        "compiled step, 8 calls": lambda: added(pieces, step),
        "whole batch at once": lambda: step(batch),
    }


def measure(name: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    runs = ways(name)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            times[label].append((time.perf_counter() - start) * 1e3)
    return {label: float(np.median(found)) for label, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = {}
    for name in arguments.models:
        found = result[name] = measure(name, arguments.rounds)
        print(f"\n{name}: {ACCUMULATION_STEPS} micro-batches of {MICROBATCH_SIZE}")
        for label, milliseconds in found.items():
            ratio = milliseconds / found["virtualbatch"]
            print(f"{label:28} {milliseconds:8.2f} ms {ratio:6.2f} x ours")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ms": result}, indent=2))


if __name__ == "__main__":
    main()
