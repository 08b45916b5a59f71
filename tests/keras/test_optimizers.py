"""Clipping, decay, averages, constraints and schedules see the whole batch, once."""

import keras
import pytest
from tests.keras import problems
from tests.keras.problems import X, compiled
from tests.keras.training import ROWS, Case, assert_equals_keras, eagerly, in_tiers, train
from tests.oracle import assert_all_close

import virtualbatch.keras as vb

optimizers = keras.optimizers
LABELS = problems.LABELS


def trained_with(name, make, **options):
    model = options.pop("model", problems.classifier)
    return Case(name, model, compiled(optimizer=make, **options), X, LABELS)


def bounded():
    return problems.classifier(
        kernel_constraint=keras.constraints.MaxNorm(0.5), bias_constraint="non_neg"
    )


REASON = "what the quick cases apply, in other combinations"

CASES = [
    trained_with("clipnorm", lambda: optimizers.SGD(1.0, clipnorm=0.05)),
    trained_with("clipvalue", lambda: optimizers.Adam(0.1, clipvalue=0.01)),
    trained_with("global_clipnorm, momentum",
                 lambda: optimizers.SGD(1.0, momentum=0.9, global_clipnorm=0.05)),
    trained_with("weight decay", lambda: optimizers.AdamW(0.1, weight_decay=0.1)),
    trained_with("EMA, overwriting", lambda: optimizers.Adam(
        0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=4))._replace(rows=ROWS),
    trained_with("constraints", lambda: optimizers.SGD(1.0), model=bounded),
    trained_with("schedule", lambda: optimizers.SGD(
        optimizers.schedules.PiecewiseConstantDecay([1, 2], [1.0, 2.0, 0.5]))),
    # Four updates, of which every second doubles the scale.
    trained_with("LossScaleOptimizer", lambda: optimizers.LossScaleOptimizer(
        optimizers.Adam(0.1, clipnorm=0.1), dynamic_growth_steps=2)),
]  # fmt: skip

FURTHER = [
    trained_with("EMA", lambda: optimizers.SGD(1.0, use_ema=True, ema_momentum=0.9)),
    trained_with("loss_scale_factor", lambda: optimizers.SGD(1.0, loss_scale_factor=8.0)),
    trained_with("LossScaleOptimizer, eager", lambda: optimizers.LossScaleOptimizer(
        optimizers.SGD(1.0), dynamic_growth_steps=2), run_eagerly=True),
    trained_with("Lamb", lambda: optimizers.Lamb(0.1)),
]  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.thorough("the same scale, read inside a program")),
        {"run_eagerly": True},
    ],
    ids=str,
)
def test_a_loss_scale_compiled_later_is_read_at_every_window(options):
    weights = []
    for accumulates in (True, False):
        keras.utils.set_random_seed(1)
        model = problems.classifier()
        model.compile(**compiled()())
        if accumulates:
            vb.accumulate(model, microbatch_size=16)
        model.fit(X, LABELS, batch_size=50, verbose=0, shuffle=False)
        scaled = optimizers.LossScaleOptimizer(optimizers.SGD(1.0), dynamic_growth_steps=1)
        model.compile(**compiled(optimizer=lambda scaled=scaled: scaled, **options)())
        model.fit(X, LABELS, batch_size=50, verbose=0, shuffle=False)
        assert float(scaled.dynamic_scale) == 2.0**18
        weights.append(model.get_weights())
    assert_all_close(*weights, 1e-10)


def test_one_fit_batch_is_one_update():
    run = train(eagerly(CASES[0]), accumulated=True)
    assert int(run.model.optimizer.iterations) == 4
    assert sum(event == "batch end" for event, _ in run.events) == 4
