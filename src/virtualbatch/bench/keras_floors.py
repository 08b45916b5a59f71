"""The floor of `fit`: the least work of any training in micro-batches with Keras."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import keras

from virtualbatch.bench.case import Case

# (compiled model, rows of a micro-batch) -> a `train_step` of that model.
Floor = Callable[[keras.Model, int], Callable[..., Any]]


def floors(case: Case) -> Mapping[str, tuple[Callable[[keras.Model], None], bool]]:
    """The floors of a case, on its backend.

    Each is a `train_step` that runs forward and backward of the micro-batches, one after another,
    and makes one update. If no row is masked, it logs the whole batch's loss and accuracy. A
    floor leaves out sample weights, counts of unmasked values over the whole batch, a remainder and
    checks. For `pairs` it computes a loss of its own for each micro-batch.

    Returns:
        Name -> (a function that prepares a compiled model, its `jit_compile`).
    """
    backend = importlib.import_module(f"virtualbatch.bench.keras_floor_{case.framework}")
    found: Mapping[str, tuple[Floor, bool]] = backend.FLOORS
    return {name: (_preparing(floor, case), jit) for name, (floor, jit) in found.items()}


def _preparing(floor: Floor, case: Case) -> Callable[[keras.Model], None]:
    def prepare(model: keras.Model) -> None:
        model.train_step = floor(model, case.microbatch_size)

    return prepare
