"""Updates per second against Keras' own accumulation and a hand-written eager loop.

Every contender makes the same updates on the same rows: 8 micro-batches of 32. They run in one
process, in turns, so that a busy machine disturbs all of them; ratios of medians are printed.

Usage: python benchmarks/speed.py [--models MLP CNN] [--rounds 5] [--json FILE]
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from models import MODELS, data

import virtualbatch.keras as vb

MICROBATCH_SIZE, ACCUMULATION_STEPS = 32, 8
BATCH_SIZE = MICROBATCH_SIZE * ACCUMULATION_STEPS
# Enough for the start of each `fit` not to count.
UPDATES = {"MLP": 80, "CNN": 40}

# Its name, updates per second of ours over theirs that the project promises, MLP and CNN.
TARGETS = {
    "Keras, gradient_accumulation_steps": (2.0, 1.2),
    "Keras, the same, steps_per_execution=8": (1.0, 1.0),
    "eager loop": (10.0, 4.0),
}

Contender = tuple[Callable[[], None], Callable[[], list[np.ndarray]]]


def loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fitted(make: Callable[[], keras.Model], x: Any, y: Any, **options: Any) -> Contender:
    """A contender that trains by `fit`."""
    keras.utils.set_random_seed(0)
    model = make()
    ours = options.pop("ours", False)
    steps = None if ours else options.pop("accumulation_steps", None)
    model.compile(
        optimizer=keras.optimizers.Adam(gradient_accumulation_steps=steps),
        loss=loss(),
        metrics=["accuracy"],
        **options,
    )
    if ours:
        vb.accumulate(model, microbatch_size=MICROBATCH_SIZE)
    size = BATCH_SIZE if ours or steps is None else MICROBATCH_SIZE
    return (
        lambda: model.fit(x, y, batch_size=size, shuffle=False, verbose=0),
        model.get_weights,
    )


def eager_loop(make: Callable[[], keras.Model], x: Any, y: Any) -> Contender:
    """The loop that most people write: gradients added in Python, without tf.function."""
    keras.utils.set_random_seed(0)
    model, optimizer, loss_fn = make(), keras.optimizers.Adam(), loss()

    def run() -> None:
        for start in range(0, len(x), BATCH_SIZE):
            total: list[tf.Tensor] | None = None
            for begin in range(start, start + BATCH_SIZE, MICROBATCH_SIZE):
                piece = slice(begin, begin + MICROBATCH_SIZE)
                with tf.GradientTape() as tape:
                    value = loss_fn(y[piece], model(x[piece], training=True))
                gradients = tape.gradient(value, model.trainable_variables)
                if total is None:
                    total = gradients
                else:
                    total = [a + b for a, b in zip(total, gradients, strict=True)]
            mean = [gradient / ACCUMULATION_STEPS for gradient in total]
            optimizer.apply_gradients(zip(mean, model.trainable_variables, strict=True))

    return run, model.get_weights


def contenders(name: str, x: Any, y: Any) -> dict[str, Contender]:
    make = MODELS[name]
    built_in = {"accumulation_steps": ACCUMULATION_STEPS}
    result = {
        "virtualbatch": fitted(make, x, y, ours=True),
        "virtualbatch, jit_compile=True": fitted(make, x, y, ours=True, jit_compile=True),
        "whole batch at once": fitted(make, x, y),
        "eager loop": eager_loop(make, x, y),
    }
    for jit_compile in (False, True):
        mode = f" (jit_compile={jit_compile})"
        result["Keras, gradient_accumulation_steps" + mode] = fitted(
            make, x, y, jit_compile=jit_compile, **built_in
        )
        result["Keras, the same, steps_per_execution=8" + mode] = fitted(
            make, x, y, jit_compile=jit_compile, steps_per_execution=8, **built_in
        )
    return result


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per update of every contender: median and quartiles over the rounds."""
    updates = UPDATES[name]
    x, y = data(name, BATCH_SIZE * updates)
    runs = contenders(name, x, y)
    for run, _ in runs.values():
        run()
    expected = runs["virtualbatch"][1]()
    difference = {
        label: max(np.abs(a - b).max() for a, b in zip(expected, weights(), strict=True))
        for label, (_, weights) in runs.items()
    }
    times: dict[str, list[float]] = {label: [] for label in runs}
    for turn in range(rounds):
        labels = list(runs)
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
            start = time.perf_counter()
            runs[label][0]()
            times[label].append((time.perf_counter() - start) / updates * 1e3)
    return {
        label: {
            "ms": float(np.median(found)),
            "low": float(np.quantile(found, 0.25)),
            "high": float(np.quantile(found, 0.75)),
            "weight_difference": float(difference[label]),
        }
        for label, found in times.items()
    }


def report(name: str, found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Prints a model's table, then each promise with the peer at its best jit_compile."""
    ours = found["virtualbatch"]["ms"]
    print(f"\n{name}: {ACCUMULATION_STEPS} micro-batches of {MICROBATCH_SIZE}, per update")
    print(f"{'':62} {'median':>8} {'quartiles':>15} {'x ours':>7} {'weights differ by':>18}")
    for label, row in found.items():
        spread = f"{row['low']:.2f}-{row['high']:.2f}"
        print(
            f"{label:62} {row['ms']:8.2f} {spread:>15} {row['ms'] / ours:7.2f} "
            f"{row['weight_difference']:18.1e}"
        )
    promises = []
    for peer, targets in TARGETS.items():
        best = min(row["ms"] for label, row in found.items() if label.startswith(peer))
        target = targets[list(UPDATES).index(name)]
        promises.append(
            {"model": name, "peer": peer, "times_faster": best / ours, "target": target}
        )
        verdict = "ok" if best / ours >= target else "MISSED"
        print(f"  {best / ours:6.2f} x the updates of {peer}; promised {target:g}: {verdict}")
    return promises


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
        "ms_per_update": {},
        "promises": [],
    }
    for name in arguments.models:
        found = measure(name, arguments.rounds)
        result["ms_per_update"][name] = found
        result["promises"] += report(name, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
