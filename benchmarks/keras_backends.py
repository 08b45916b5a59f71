"""Accumulation on one of Keras' backends, beside a hand-written step and Keras' own accumulation.

Every contender makes the same updates on the same rows, 8 micro-batches of 32, by the train
function that `fit` calls; Keras' own accumulation calls it once per micro-batch. They run in one
process, in turns; the ratios are medians over the rounds.

Usage: python benchmarks/keras_backends.py --backend torch [--models MLP CNN] [--rounds 60]
"""

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

MICROBATCH_SIZE, ACCUMULATION_STEPS = 32, 8
# Ours over theirs that the project promises.
TARGETS = {"hand-written train_step": 1.05, "gradient_accumulation_steps": 1.0}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--backend", required=True, choices=["torch", "jax"])
parser.add_argument("--models", nargs="+", default=["MLP", "CNN"])
parser.add_argument("--rounds", type=int, default=60)
parser.add_argument("--updates", type=int, default=5, help="per contender and round")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
# Read when Keras is imported. Threads that wait for each other on a shared machine measure the
# machine.
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

import keras  # noqa: E402
import numpy as np  # noqa: E402
from models import MODELS, data  # noqa: E402

import virtualbatch.keras as vb  # noqa: E402


def on_torch(model: keras.Model) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """(batch -> logs, () -> weights) by the train function that `fit` calls."""
    return lambda batch: model.train_function([batch]), model.get_weights


def on_jax(model: keras.Model) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """The same where the function takes and gives the state, which it overwrites."""
    import jax

    state = jax.tree.map(
        lambda x: x.copy(),
        [
            [variable.value for variable in variables]
            for variables in (
                model.trainable_variables,
                model.non_trainable_variables,
                model.optimizer.variables,
                model.metrics_variables,
            )
        ],
    )

    def train(batch: Any) -> Any:
        nonlocal state
        logs, state = model.train_function(tuple(state), iter([batch]))
        return logs

    return train, lambda: [np.asarray(value) for value in state[0]]


RUNNERS = {"torch": on_torch, "jax": on_jax}

Contender = tuple[Callable[[], Any], Callable[[], list[np.ndarray]]]


def contender(name: str, prepare: Callable[[keras.Model], None], steps: int | None) -> Contender:
    """A compiled model that makes one update per call, and a look at its weights.

    Args:
        name: which model.
        prepare: changes the compiled model.
        steps: Keras' own accumulation, or None where one call sees the whole batch.
    """
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    model.compile(
        keras.optimizers.Adam(gradient_accumulation_steps=steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    prepare(model)
    x, y = data(name, MICROBATCH_SIZE * ACCUMULATION_STEPS)
    size = MICROBATCH_SIZE if steps else len(x)
    # What is not built yet is built by the first call.
    model.fit(x, y, batch_size=size, shuffle=False, verbose=0)
    batches = [
        tuple(keras.ops.convert_to_tensor(part[start : start + size]) for part in (x, y))
        for start in range(0, len(x), size)
    ]

    train, weights = RUNNERS[arguments.backend](model)

    def update() -> Any:
        for batch in batches:
            logs = train(batch)
        return logs

    return update, weights


def ways(name: str) -> dict[str, Contender]:
    """All contenders for one model."""
    hand_written = importlib.import_module(f"hand_written_{arguments.backend}").train_step

    def by_hand(model: keras.Model) -> None:
        step = partial(hand_written, microbatch_size=MICROBATCH_SIZE)
        model.train_step = MethodType(lambda self, *data: step(self, *data), model)

    def ours(model: keras.Model) -> None:
        vb.accumulate(model, microbatch_size=MICROBATCH_SIZE)

    return {
        "virtualbatch": contender(name, ours, None),
        "hand-written train_step": contender(name, by_hand, None),
        "gradient_accumulation_steps": contender(name, lambda model: None, ACCUMULATION_STEPS),
        "whole batch at once": contender(name, lambda model: None, None),
    }


def measure(name: str) -> dict[str, Any]:
    """Median milliseconds an update, and the median ratio of ours to each other contender."""
    contenders = ways(name)
    weights = [look() for _, look in contenders.values()]
    for other in weights[1:]:
        # The same work, or the times say nothing. Adam divides by what may be small.
        for a, b in zip(weights[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for turn in range(arguments.rounds + 3):
        # Whoever comes first in a round may find other caches.
        for label in sorted(contenders, reverse=bool(turn % 2)):
            update, _ = contenders[label]
            start = time.perf_counter()
            for _ in range(arguments.updates):
                logs = update()
            float(logs["loss"])
            times[label].append((time.perf_counter() - start) / arguments.updates * 1e3)
    times = {label: found[3:] for label, found in times.items()}
    ratios = {
        label: float(np.median(np.divide(times["virtualbatch"], found)))
        for label, found in times.items()
    }
    return {
        "ms": {label: float(np.median(found)) for label, found in times.items()},
        "ratio": ratios,
    }


def main() -> None:
    result = {}
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    for name in arguments.models:
        found = result[name] = measure(name)
        print(f"\n{name}: {ACCUMULATION_STEPS} micro-batches of {MICROBATCH_SIZE}")
        print(f"{'':30}{'ms an update':>14}{'ours / this':>14}{'asked':>10}")
        for label, milliseconds in found["ms"].items():
            target = f"<= {TARGETS[label]}" if label in TARGETS else ""
            print(f"{label:30}{milliseconds:14.2f}{found['ratio'][label]:14.3f}{target:>10}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
