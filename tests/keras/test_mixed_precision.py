"""Half precision: one loss scale per window, and buffers that do not stall."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras import problems
from tests.keras.backends import available, modes
from tests.keras.problems import FEATURES, X, crossentropy
from tests.oracle import assert_close, tolerance

import virtualbatch.keras as vb

LABELS = problems.LABELS
# float16 holds nothing above 65504; this row overflows in the first layer.
LARGE = np.where(np.arange(len(X))[:, None] == 20, 6e4, X)


def set_policy(name):
    """Half precision is measured against float32, as Keras does by default."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(name)


def trained(policy, accumulates, x=X, epochs=2, **options):
    set_policy(policy)
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((FEATURES,)), layers.Dense(4, activation="relu"), layers.Dense(3)]
    )
    optimizer = keras.optimizers.SGD(0.1)
    if options.pop("growing", False):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, dynamic_growth_steps=2)
    model.compile(optimizer, crossentropy(), **options)
    if accumulates:
        vb.accumulate(model, microbatch_size=16)
    history = model.fit(x, LABELS, batch_size=50, epochs=epochs, verbose=0, shuffle=False)
    return model, history.history


EAGER = {"run_eagerly": True}
JITTED = [("mixed_float16", {"jit_compile": True})] if available("jit_compile") else []


@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        ("mixed_float16", {}),
        ("mixed_bfloat16", EAGER),
        *(
            pytest.param(*given, marks=pytest.mark.thorough("the other policy in the other mode"))
            for given in [("mixed_float16", EAGER), ("mixed_bfloat16", {}), *JITTED]
        ),
    ],
    ids=str,
)
def test_mixed_policies_take_the_steps_that_keras_takes(policy, mode):
    start, _ = trained(policy, False, epochs=0)
    expected, due = trained(policy, False, epochs=1, **mode)
    actual, found = trained(policy, True, epochs=1, **mode)
    # About six roundings to half precision lie between an input and a gradient.
    allowed = tolerance(policy.removeprefix("mixed_"), 6)
    for a, b, c in zip(*(x.get_weights() for x in (actual, expected, start)), strict=True):
        assert_close(a - c, b - c, allowed)
    assert_close(found["loss"], due["loss"], allowed)


@pytest.mark.parametrize(
    ("policy", "mode"), [("bfloat16", {}), ("bfloat16", EAGER), ("float16", {})], ids=str
)
def test_half_variables_agree_to_their_rounding(policy, mode):
    expected, due = trained(policy, False, epochs=1, **mode)
    actual, found = trained(policy, True, epochs=1, **mode)
    # Three updates, each rounded to the variable.
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        assert_close(a.astype("float64"), b.astype("float64"), tolerance(policy, 3))
    assert_close(found["loss"], due["loss"], tolerance(policy, 3))


def test_float32_agrees_to_its_rounding():
    start, _ = trained("float32", False, epochs=0)
    expected, due = trained("float32", False, epochs=1, **EAGER)
    actual, found = trained("float32", True, epochs=1)
    # What a weight moves by sums over 50 rows, three times.
    for a, b, c in zip(*(x.get_weights() for x in (actual, expected, start)), strict=True):
        assert_close(a - c, b - c, tolerance("float32", 150))
    assert_close(found["loss"], due["loss"], tolerance("float32", 150))


@pytest.mark.parametrize("mode", modes(), ids=str)
def test_an_overflow_skips_the_window_once(mode):
    expected, _ = trained("mixed_float16", False, LARGE, growing=True, **mode)
    actual, _ = trained("mixed_float16", True, LARGE, growing=True, **mode)
    # Row 20 is in the first batch of each epoch: of six windows two are skipped.
    assert int(actual.optimizer.iterations) == int(expected.optimizer.iterations) == 4
    # Twice halved, and twice doubled after two good windows.
    assert float(actual.optimizer.dynamic_scale) == float(expected.optimizer.dynamic_scale)
    assert float(actual.optimizer.dynamic_scale) == 2.0**15
    assert int(actual.optimizer.step_counter) == int(expected.optimizer.step_counter) == 0
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        assert np.isfinite(a).all()
        assert_close(a, b, tolerance("float16", 6))


def test_a_skipped_window_leaves_everything_but_the_scale():
    set_policy("mixed_float16")
    model = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(3)])
    model.compile("adam", crossentropy())
    vb.accumulate(model, microbatch_size=16)
    before = model.get_weights()
    model.fit(LARGE[:50], LABELS[:50], batch_size=50, verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(model.optimizer.iterations) == 0
    assert float(model.optimizer.dynamic_scale) == 2.0**14


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        ("bfloat16", 512),
        pytest.param("float16", 4096, marks=pytest.mark.thorough("thousands of micro-batches")),
    ],
)
def test_f12_sums_do_not_stall(policy, count):
    # Gradients of exactly 1: a bfloat16 sum of ones stops at 256, one of float16 at 2048.
    set_policy(policy)
    outputs = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((1,)), outputs])
    model.compile(keras.optimizers.SGD(1.0), lambda y_true, y_pred: ops.mean(y_pred, -1))
    vb.accumulate(model, microbatch_size=1)
    model.fit(np.ones((count, 1)), np.zeros(count), batch_size=count, verbose=0)
    assert_close(outputs.kernel.numpy().astype("float64"), [[-1.0]], 1e-3)
