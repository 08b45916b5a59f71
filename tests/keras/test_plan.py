"""Planning for Keras: nothing changed, limits kept, sizes found at the first batch of `fit`."""

import logging

import keras
import numpy as np
import pytest
from tests.keras.backends import BACKEND, available
from tests.keras.running_out import BATCH, X, Y, assert_same, model, state

import virtualbatch.keras as vb
from virtualbatch import Auto
from virtualbatch.plan.search import Search

pytestmark = pytest.mark.usefixtures("untimed_plans")

ROWS = 64


@pytest.fixture
def plans(monkeypatch):
    """The plans that are made."""
    made = []
    plan = Search.plan

    def counted(self):
        made.append(plan(self))
        return made[-1]

    monkeypatch.setattr(Search, "plan", counted)
    return made


def large(rows=ROWS):
    """A model with activations of about a MiB per row, and a batch for it."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((256, 8))
    x = keras.layers.Dense(256, activation="tanh")(inputs)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Dropout(0.1)(x))
    found = keras.Model(inputs, keras.layers.Dense(1)(x))
    found.compile(optimizer="adam", loss="mse")
    rng = np.random.default_rng(0)
    return found, (rng.normal(size=(rows, 256, 8)), rng.normal(size=(rows, 1)))


@pytest.mark.thorough("plans many sizes; every engine's test_plan.py measures peaks")
def test_peaks_grow_with_the_rows():
    found, batch = large()
    plan = vb.plan(found, batch)
    rows = {row.microbatch_size: row.peak_bytes for row in plan.rows if row.measured}
    assert set(rows) >= {8, 32, ROWS}
    # tanh alone keeps half a MiB per row in float64.
    assert rows[32] - rows[8] > 24 * 256 * 256 * 8
    slope = (rows[32] - rows[8]) / 24
    within = {"jax": 0.03, "torch": 0.10, "tensorflow": 0.15}[BACKEND]
    size = max(size for size in rows if size < ROWS)
    assert abs((rows[8] + slope * (size - 8)) / rows[size] - 1) < within


def test_a_limit_is_kept():
    found, batch = large()
    rows = vb.plan(found, batch).rows
    limit = (rows[0].peak_bytes + rows[-1].peak_bytes) // 2
    plan = vb.plan(found, batch, memory_limit=limit)
    assert plan.memory_limit == limit
    assert plan.microbatch_size < ROWS
    chosen = next(row for row in plan.rows if row.microbatch_size == plan.microbatch_size)
    assert chosen.peak_bytes <= limit


def test_planning_changes_nothing(quick_plans):
    found = model()
    found.train_on_batch(X[:24], Y[:24])
    before = state(found)
    vb.plan(found, (X[:24], Y[:24]))
    assert_same(before, state(found))
    due = model()
    due.train_on_batch(X[:24], Y[:24])
    assert found.train_on_batch(X[24:48], Y[24:48]) == due.train_on_batch(X[24:48], Y[24:48])
    assert_same(state(found), state(due))


@pytest.mark.thorough("plans many sizes; every engine's test_plan.py measures peaks")
@pytest.mark.parametrize("batch", [(X, Y), (X, Y, np.arange(60.0))], ids=["x, y", "weights"])
def test_batches_as_fit_yields_them(batch):
    plan = vb.plan(model(), batch)
    assert 1 <= plan.microbatch_size <= 60


def test_an_impossible_limit_is_refused():
    with pytest.raises(ValueError, match=r"must hold a micro-batch of one row"):
        vb.plan(model(), (X, Y), memory_limit="10B")


def test_a_model_that_is_not_compiled_is_refused():
    with pytest.raises(ValueError, match=r"Call model\.compile"):
        vb.plan(keras.Sequential([keras.layers.Dense(1)]), (X, Y))


def fit(found, size, **options):
    vb.accumulate(found, microbatch_size=size)
    options = {"epochs": 2, "batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    return found.fit(X, Y, **options).history


def test_a_planned_run_is_that_of_the_same_size(plans, caplog, quick_plans):
    with caplog.at_level(logging.INFO, "virtualbatch"):
        found = model()
        history = fit(found, "auto")
    (plan,) = plans
    assert f"microbatch_size={plan.microbatch_size} for batches of up to 24 rows" in caplog.text
    due = model()
    assert fit(due, plan.microbatch_size) == history
    assert_same(state(found), state(due))


def test_a_generator_loses_no_batch(plans):
    def batches():
        for start in (0, 24, 48):
            yield X[start : start + 24], Y[start : start + 24]

    found = model()
    vb.accumulate(found, microbatch_size="auto")
    found.fit(batches(), steps_per_epoch=3, shuffle=False, verbose=0)
    due = model()
    vb.accumulate(due, microbatch_size=plans[0].microbatch_size)
    due.fit(batches(), steps_per_epoch=3, shuffle=False, verbose=0)
    assert_same(state(found), state(due))
    assert int(found.optimizer.iterations) == 3


STEPS = [1, 2] if available("steps_per_execution") else [1]


@pytest.mark.thorough("plans many sizes; every engine's test_plan.py measures peaks")
@pytest.mark.parametrize("steps_per_execution", STEPS)
def test_several_steps_per_execution(plans, steps_per_execution, quick_plans):
    found, due = model(), model()
    for one in (found, due):
        one.steps_per_execution = steps_per_execution
    history = fit(found, "auto")
    assert fit(due, plans[0].microbatch_size) == history
    assert_same(state(found), state(due))


def test_a_signature_is_planned_once(plans):
    found = model()
    size = Auto(memory_limit="1GiB")
    fit(found, size, epochs=2)
    fit(found, size, epochs=1)
    assert len(plans) == 1
    assert plans[0].memory_limit == 2**30


def test_another_loss_is_planned_anew(plans):
    found = model()
    fit(found, "auto", epochs=1)
    for _ in range(2):
        found.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
        found.fit(X, Y, batch_size=BATCH, verbose=0)
    assert len(plans) == 2


def test_a_plan_of_a_file_is_not_used_under_another_limit(plans, tmp_path):
    for limit in ("2GiB", "1GiB"):
        fit(model(), Auto(file=tmp_path / "plans.json", memory_limit=limit), epochs=1)
    assert [plan.memory_limit for plan in plans] == [2**31, 2**30]


def test_plans_of_a_file_are_used(plans, tmp_path):
    for _ in range(2):
        fit(model(), Auto(file=tmp_path / "plans.json"), epochs=1)
    assert len(plans) == 1
