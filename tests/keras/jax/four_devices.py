"""Keras models on JAX whose batches `keras.distribution` spreads over four devices.

Named checks, run by test_devices.py in processes of their own: devices are made when JAX starts.
What they are compared with is plain Keras on one device.
"""

import re
import sys

# Keras would load it to set a seed, which takes longer than most of these checks.
sys.modules["tensorflow"] = None

import logging
import warnings

import jax
import keras
import numpy as np
import pytest
from keras import layers
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel
from keras.src.backend.common import dtypes
from tests.keras import coupled, packing, problems, running_out, test_noise
from tests.keras.problems import LABELS, ROW_WEIGHTS, X, classifier, compiled
from tests.keras.test_metrics import functions
from tests.keras.training import Case, assert_same_run, train

import virtualbatch.keras as vb
from virtualbatch import Auto
from virtualbatch.plan import planner
from virtualbatch.plan.timing import TimeBudget

DEVICES = 4
# On each device 12 rows a batch, cut into 5 5 2; the last batch of an epoch has 6, cut into 5 1.
ROWS, BATCH = 120, 48
FIT = {"batch_size": BATCH, "epochs": 3}
SIZES = {"microbatch_size": 5}


def data_parallel():
    return DataParallel(auto_shard_dataset=False)


def model_parallel():
    """Rows over two devices and each kernel over two."""
    mesh = DeviceMesh((2, 2), ("model", "rows"), keras.distribution.list_devices())
    layouts = LayoutMap(mesh)
    layouts[".*kernel"] = ("model", None)
    return ModelParallel(layout_map=layouts, batch_dim_name="rows", auto_shard_dataset=False)


def case(model=classifier, x=X, y=LABELS, fit=None, sizes=SIZES, rows=ROWS, **options):
    return Case("", model, compiled(**options), x, y, FIT | (fit or {}), sizes, rows=rows)


def spread(of, distribution=data_parallel):
    """The run of a case, accumulated, whose batches are spread."""

    def model():
        # Later than the new session with which a run begins: that forgets the distribution.
        keras.distribution.set_distribution(distribution())
        return of.model()

    try:
        return train(of._replace(model=model), accumulated=True)
    finally:
        keras.distribution.set_distribution(None)


def assert_same(of, distribution=data_parallel):
    """Raises unless a case over devices gives what plain Keras gives on one."""
    run = spread(of, distribution)
    assert_same_run(run, train(of, accumulated=False))
    return run


def adam():
    return keras.optimizers.AdamW(0.01, global_clipnorm=0.1, use_ema=True)


def weighted():
    assert_same(case(optimizer=adam, fit={"sample_weight": ROW_WEIGHTS}))


def masked():
    # No device has as many words as another, and the first has none.
    first = np.arange(ROWS) % BATCH < BATCH // DEVICES
    ids = np.where(first[:, None], 0, problems.WORD_IDS[:ROWS])
    assert_same(case(problems.tagger, ids, problems.TOKEN_LABELS, metrics=None))


def normalized():
    """BatchNorm before anything is trained, which sees the same whatever the weights are."""
    return keras.Sequential(
        [
            keras.Input((problems.FEATURES,)),
            layers.BatchNormalization(momentum=0.7),
            layers.Dense(problems.CLASSES),
        ]
    )


def statistics_of_all_rows():
    of = case(normalized, rows=96, metrics=None)
    found, due = spread(of), train(of, accumulated=False)
    for variable, expected in zip(*(run.model.non_trainable_variables for run in (found, due))):
        np.testing.assert_allclose(variable.numpy(), expected.numpy(), rtol=1e-12)


def losses_of_all_rows():
    # Dice compares each row of predictions with the same row of targets.
    assert_same(coupled.HEADS._replace(rows=40, sizes={"microbatch_size": 2}))


def kernels_over_devices():
    run = assert_same(case(optimizer=adam), model_parallel)
    kernel = run.model.layers[0].kernel.value
    assert kernel.sharding.spec[0] == "model", kernel.sharding


def _dense(distribution):
    """The text of a program of one device: 32 micro-batches of rows, each of 32 columns."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((24,)), layers.Dense(64), layers.Dense(16)])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    vb.accumulate(model, microbatch_size=32)
    batch = np.zeros((1024, 24)), np.zeros((1024, 16))
    layouts = [distribution.get_data_layout(x.shape) for x in batch]
    x, y = map(keras.distribution.distribute_tensor, batch, layouts)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    return jax.jit(model.train_step).lower(state, (x, y, None)).compile().as_text()


def every_device_computes_its_own_rows():
    with data_parallel().scope():
        text = _dense(keras.distribution.distribution())
    # Forward products of 32 rows; those of gradients have none.
    assert set(re.findall(r"= f64\[(\d+),(?:64|16)\]\S* dot\(", text)) == {"32", "64"}, text
    print(re.findall(r"= (.*) (all-\w+|collective-\w+|reduce-scatter)", text))


def rows_that_devices_do_not_divide():
    with pytest.raises(ValueError, match="divisible|partitioned"):
        spread(case(rows=50))


def a_batch_of_one_micro_batch():
    assert_same(case(sizes={"microbatch_size": 12}, metrics=None))
    sizes = {"accumulation_steps": 3, "microbatch_size": 4}
    steps = case(sizes=sizes, metrics=functions)
    assert_same(steps._replace(rows=96))


def several_steps_at_once():
    assert_same(case(steps_per_execution=2, rows=96))


def eagerly():
    assert_same(case(run_eagerly=True, rows=BATCH, fit={"epochs": 1}))


def packed():
    of = Case(
        "", packing.tagger, compiled(), packing.IDS, packing.LABELS, FIT, packing.PACKED, rows=ROWS
    )
    assert_same(of._replace(compile=compiled(metrics=None)))


def batches_by_hand():
    def trained():
        keras.utils.set_random_seed(1)
        model = classifier()
        model.compile(adam(), problems.crossentropy(), metrics=["accuracy"])
        vb.accumulate(model, **SIZES)
        logs = [model.train_on_batch(X[:n], LABELS[:n], return_dict=True) for n in (48, 24, 8)]
        return logs, model.get_weights()

    with data_parallel().scope():
        found, weights = trained()
    due, expected = trained()
    for a, b in zip(found, due, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-10)
    for a, b in zip(weights, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def mean_error(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred))


def batch_sum(y_true, y_pred):
    return keras.ops.sum(keras.ops.square(y_true - y_pred), -1) * keras.ops.shape(y_pred)[0]


def regressor():
    return keras.Sequential([keras.Input((problems.FEATURES,)), layers.Dense(2)])


def the_first_window_proves_itself():
    of = case(regressor, y=problems.TARGETS, loss=lambda: mean_error, metrics=None)
    cut = of._replace(rows=96, sizes={"microbatch_size": 2, "gather": False})
    assert_same(cut)
    with pytest.raises(ValueError, match="Got"):
        spread(cut._replace(compile=compiled(loss=lambda: batch_sum, metrics=None)))


def a_size_that_runs_out_of_memory():
    """The first batch, whose micro-batches have 12 rows, runs again with 6."""
    def trained(size, fail=()):
        model = running_out.model(running_out.Points(fail))
        vb.accumulate(model, microbatch_size=size)
        model.fit(X48, Y48, batch_size=48, epochs=2, shuffle=False, verbose=0)
        return model, running_out.state(model)

    x = np.concatenate([running_out.X[:48]])
    X48, Y48 = x, running_out.Y[:48]
    with data_parallel().scope():
        model, found = trained(8, [0])
        assert model.train_step.most == 4
        _, due = trained(4)
    running_out.assert_same(found, due)


def a_size_that_is_planned():
    planner.BUDGET = TimeBudget(seconds=0.0)
    with data_parallel().scope():
        keras.utils.set_random_seed(1)
        model = classifier()
        model.compile("sgd", problems.crossentropy())
        plan = vb.plan(model, (X[:64], LABELS[:64]))
        print(plan)
        assert plan.microbatch_size <= 16, plan
        assert max(row.microbatch_size for row in plan.rows) <= 16
        vb.accumulate(model, microbatch_size=Auto())
        model.fit(X[:64], LABELS[:64], batch_size=64, verbose=0)
        assert model.train_step.most <= 16
        print(model.train_step.most)


def a_certificate():
    with data_parallel().scope():
        keras.utils.set_random_seed(1)
        model = classifier()
        model.compile("sgd", problems.crossentropy())
        print(vb.certify(model, (X[:32], LABELS[:32]), microbatch_size=8))


def noise():
    def told():
        seen = test_noise.Seen()
        keras.utils.set_random_seed(1)
        model = classifier()
        model.compile("sgd", problems.crossentropy())
        vb.accumulate(model, microbatch_size=size)
        model.fit(X[:64], LABELS[:64], batch_size=64, shuffle=False, callbacks=[seen], verbose=0)
        return seen.stats

    size = 4
    with data_parallel().scope():
        found = told()
    order = np.arange(64).reshape(4, 4, 4).swapaxes(0, 1).reshape(-1)
    size = 16
    global X, LABELS
    X, LABELS = X[:64][order], LABELS[:64][order]
    np.testing.assert_allclose(found, told(), rtol=1e-10)


def dropout():
    masks = []
    with data_parallel().scope():
        keras.utils.set_random_seed(1)
        outputs = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.5), outputs])
        model.compile(keras.optimizers.SGD(1.0), lambda y_true, y_pred: y_pred[:, 0])
        vb.accumulate(model, microbatch_size=1)
        model.train_on_batch(np.eye(64)[[0] * 8] * 0 + 1, np.zeros(8))
        gradient = outputs.kernel.numpy()[:, 0] * -8 / 2
        print(gradient)
        assert len(set(np.round(gradient))) > 4


def another_distribution_later():
    keras.utils.set_random_seed(1)
    model = classifier()
    model.compile("sgd", problems.crossentropy())
    vb.accumulate(model, microbatch_size=4)
    options = dict(batch_size=48, shuffle=False, verbose=0)
    model.fit(X[:48], LABELS[:48], **options)
    with data_parallel().scope():
        model.fit(X[:48], LABELS[:48], **options)
    model.fit(X[:48], LABELS[:48], **options)
    due = classifier()


if __name__ == "__main__":
    warnings.simplefilter("error")
    # NumPy's word about variables of Keras, which Keras itself reads through NumPy.
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")
    jax.config.update("jax_enable_x64", True)
    # Keras on JAX rounds means of float64 to float32: see tests/keras/conftest.py.
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    assert len(jax.devices()) == DEVICES
    import time
    import traceback

    for name in sys.argv[1:]:
        t = time.process_time()
        try:
            globals()[name]()
            print("ok", name, round(time.process_time() - t, 1), flush=True)
        except BaseException:
            print("FAILED", name, traceback.format_exc()[-1800:], flush=True)
