"""The floor of `fit`: what nobody who trains in micro-batches with Keras can be faster than."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import keras

from virtualbatch.bench.case import Case

# (compiled model, rows of a micro-batch) -> a `train_step` of that model.
Floor = Callable[[keras.Model, int], Callable[..., Any]]


def floors(case: Case) -> Mapping[str, tuple[Callable[[keras.Model], None], bool]]:
    """The floors of a case, on the backend that it names.

    Each is a `train_step` that runs forward and backward of the micro-batches, one after another,
    and makes one update. Loss and accuracy are those of the whole batch, where no row is masked.
    Left out are weights, what masks leave of the whole batch, a remainder and checks. In the model
    of pairs each micro-batch has a loss of its own.

    Returns:
        Name -> (what prepares a compiled model, its `jit_compile`).
    """
    backend = importlib.import_module(f"virtualbatch.bench.keras_floor_{case.framework}")
    found: Mapping[str, tuple[Floor, bool]] = backend.FLOORS
    return {name: (_preparing(floor, case), jit) for name, (floor, jit) in found.items()}


def _preparing(floor: Floor, case: Case) -> Callable[[keras.Model], None]:
    def prepare(model: keras.Model) -> None:
        model.train_step = floor(model, case.microbatch_size)

    return prepare
