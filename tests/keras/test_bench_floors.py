"""The floors that `virtualbatch bench` times beside ours: they do all that they claim."""

import keras
import numpy as np
import pytest

from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import FLOOR
from virtualbatch.bench.keras_floors import floors
from virtualbatch.bench.keras_models import adam, cross_entropy, model_of
from virtualbatch.bench.keras_ways import entries

CASE = Case(f"keras-{keras.backend.backend()}", "MLP", microbatch_size=8, accumulation_steps=3)


def fitted(x, y, prepare=None, epochs=1, jit="auto"):
    """What `fit` logs of updates on a whole batch."""
    model = model_of(CASE)
    model.compile(adam(), cross_entropy(), metrics=["accuracy"], jit_compile=jit)
    if prepare is not None:
        prepare(model)
    return model.fit(x, y, batch_size=len(x), epochs=epochs, shuffle=False, verbose=0).history


@pytest.mark.parametrize("name", floors(CASE))
def test_a_floor_trains_and_logs_what_the_whole_batch_does(name):
    prepare, jit = floors(CASE)[name]
    x, y = CASE.batch()
    whole, floor = fitted(x, y), fitted(x, y, prepare, jit=jit)
    # Each micro-batch took part, or a mean over them would be another one.
    assert floor.keys() == whole.keys() == {"loss", "accuracy"}
    for metric in whole:
        np.testing.assert_allclose(floor[metric], whole[metric], rtol=1e-12)
    # Which of equal micro-batches gave the gradients, the last one or all, does not matter.
    x, y = (np.concatenate([leaf[: CASE.microbatch_size]] * 3) for leaf in (x, y))
    losses = fitted(x, y, prepare, epochs=4, jit=jit)["loss"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def test_the_floors_take_part():
    named = [entry.name for entry in entries(CASE) if entry.role == FLOOR]
    assert named == list(floors(CASE))
