"""Ways to train with Keras' `fit`, on the backend that `KERAS_BACKEND` names."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np

import virtualbatch.keras as vb
from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import (
    FLOOR,
    OURS,
    PEER,
    VIRTUALBATCH,
    WHOLE,
    WHOLE_BATCH,
    Contender,
)
from virtualbatch.bench.keras_floors import floors
from virtualbatch.bench.keras_models import adam, contrastive, cross_entropy, model_of

_BUILT_IN = "gradient_accumulation_steps"


def entries(case: Case) -> list[Contender]:
    """All contenders that can run a case, each with its own model."""
    jax = keras.backend.backend() == "jax"
    tensorflow = keras.backend.backend() == "tensorflow"
    ours = partial(vb.accumulate, microbatch_size=case.microbatch_size)
    found = [
        contender(VIRTUALBATCH, OURS, case, ours),
        *(
            contender(name, FLOOR, case, prepare, jit=jit)
            for name, (prepare, jit) in floors(case).items()
        ),
        contender(WHOLE_BATCH, WHOLE, case),
    ]
    if tensorflow:
        found.append(contender(f"{VIRTUALBATCH}, jit_compile=True", OURS, case, ours, jit=True))
    # On TensorFlow, Keras compiles with XLA by default. On CPU that may be slower, so time both.
    # On JAX, Keras cannot train without XLA.
    for jit in (True, False) if tensorflow else (jax,):
        mode = f"jit_compile={jit}" if tensorflow else ""
        names = [_BUILT_IN, mode]
        found.append(contender(", ".join(filter(None, names)), PEER, case, built_in=True, jit=jit))
        if not tensorflow and not jax:
            continue
        steps = case.accumulation_steps
        names.insert(1, f"steps_per_execution={steps}")
        found.append(
            contender(
                ", ".join(filter(None, names)), PEER, case, built_in=True, jit=jit, execution=steps
            )
        )
    return found


class _Clock(keras.callbacks.Callback):
    """Times an epoch without the start and the end of `fit`."""

    seconds = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self._start


def contender(
    name: str,
    role: str,
    case: Case,
    prepare: Callable[[keras.Model], object] | None = None,
    *,
    built_in: bool = False,
    jit: bool | str = "auto",
    execution: int = 1,
) -> Contender:
    """A contender that trains by `fit`.

    Args:
        name: the name of the contender.
        role: see `virtualbatch.bench.contender.Contender`.
        case: the case to train.
        prepare: changes the compiled model; None for no change.
        built_in: whether Keras' own accumulation is on.
        jit: `jit_compile`.
        execution: `steps_per_execution`.
    """
    model = model_of(case)
    # Keras refuses to accumulate one micro-batch, so that case is a plain update.
    steps = case.accumulation_steps if built_in and case.accumulation_steps > 1 else None
    pairs = case.model == "pairs"
    model.compile(
        adam(steps),
        (lambda _, embeddings: contrastive(embeddings)) if pairs else cross_entropy(),
        metrics=None if pairs else ["accuracy"],
        jit_compile=jit,
        steps_per_execution=execution,
    )
    if prepare is not None:
        prepare(model)
    size = case.microbatch_size if built_in else case.rows
    clock = _Clock()

    def train(updates: int) -> float:
        x, y = _repeated(case, updates)
        model.fit(x, y, batch_size=size, shuffle=False, verbose=0, callbacks=[clock])
        return clock.seconds / updates

    return Contender(name, role, train, lambda: [np.array(w) for w in model.get_weights()])


def _repeated(case: Case, updates: int) -> Any:
    """The batch, repeated once per update."""
    x, y = (np.concatenate([leaf] * updates) for leaf in case.batch())
    # The loss of `pairs` needs no targets, but Keras requires some.
    return ((x, y), np.zeros(len(x))) if case.model == "pairs" else (x, y)
