"""A plan says whether XLA makes its size faster, and changes nothing of the model."""

import time
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

import virtualbatch.keras as vb
from virtualbatch import Auto
from virtualbatch.keras._tensorflow import xla
from virtualbatch.plan.plan import Plan, PlanRow
from virtualbatch.plan.search import Search

BATCH = np.ones((8, 3)), np.ones((8, 1))
PLAN = Plan(4, 2, 1, "Why.", (PlanRow(4, 1, True, 0.1), PlanRow(8, 1, True, 0.1)))


def model(**options):
    made = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    made.compile("sgd", "mse", **options)
    return made


def updates(found, seconds=lambda mode: 0.2):
    """What makes updates, and the modes in which they were traced."""
    modes = []

    def update():
        @tf.function(autograph=False)
        def run():
            modes.append(found.jit_compile)
            return seconds(found.jit_compile)

        return lambda: float(run())

    return update, modes


@pytest.mark.parametrize(
    ("is_compiled", "said"),
    [
        (False, "With XLA an update is 2.00 times as fast: compile(..., jit_compile=True)."),
        (True, "Without XLA an update takes 2.00 times as long."),
    ],
)
def test_the_plan_says_which_way_is_faster(is_compiled, said):
    found = model(jit_compile=is_compiled)
    update, modes = updates(found, seconds=lambda mode: 0.2 if mode else 0.4)
    assert xla.compared(found, PLAN, update).reason == f"Why. {said}"
    assert modes == [is_compiled, not is_compiled]
    assert found.jit_compile is is_compiled


def test_layers_that_xla_does_not_take_are_left():
    found = model()
    found.layers[-1].supports_jit = False
    update, modes = updates(found)
    assert xla.compared(found, PLAN, update) is PLAN
    assert modes == [False]
    assert found.jit_compile is False


def test_what_xla_cannot_compile_is_left():
    found = model()

    def update():
        @tf.function(autograph=False)
        def run():
            compiled = tf.function(
                lambda: tf.numpy_function(time.time, [], tf.float64), jit_compile=found.jit_compile
            )
            return 0.2 + 0 * compiled()

        return lambda: float(run())

    assert xla.compared(found, PLAN, update) is PLAN
    assert found.jit_compile is False


def test_nothing_is_compiled_where_no_two_sizes_were_timed():
    update, modes = updates(found := model())
    xla.compared(found, replace(PLAN, rows=PLAN.rows[:1]), update)
    assert modes == []


def test_the_plan_of_a_model_is_compared(quick_plans):
    assert "With XLA an update " in vb.plan(model(), BATCH).reason


def test_a_model_that_is_compiled_the_other_way_is_planned_anew(untimed_plans, monkeypatch):
    planned, plan = [], Search.plan
    monkeypatch.setattr(Search, "plan", lambda search: planned.append(search) or plan(search))
    size = Auto()
    for mode in (False, True, True):
        vb.accumulate(found := model(jit_compile=mode), microbatch_size=size)
        found.fit(*BATCH, batch_size=8, verbose=0)
    assert len(planned) == 2
