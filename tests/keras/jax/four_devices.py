"""Keras models on JAX whose batches `keras.distribution` spreads over four devices.

Named checks, run by test_devices.py in processes of their own: devices are made when JAX starts.
What they are compared with is plain Keras on one device.
"""

import logging
import re
import sys
from functools import partial

import jax
import keras
import numpy as np
import pytest
from keras import layers
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel
from tests.keras import coupled, packing, problems, running_out, test_noise
from tests.keras.jax.alone import alone
from tests.keras.problems import LABELS, ROW_WEIGHTS, X, classifier, compiled
from tests.keras.test_metrics import functions
from tests.keras.training import Case, assert_same_run, train

import virtualbatch.keras as vb
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


def adam_with_clipping():
    assert_same(case(optimizer=adam, fit={"sample_weight": ROW_WEIGHTS}))


def weighted_and_masked():
    # No device has as many words as another, and the first has none.
    first = np.arange(ROWS) % BATCH < BATCH // DEVICES
    ids = np.where(first[:, None], 0, problems.WORD_IDS[:ROWS])
    weights = {"sample_weight": problems.TOKEN_WEIGHTS}
    sgd = partial(keras.optimizers.SGD, 0.1, global_clipnorm=0.01)
    of = case(problems.tagger, ids, problems.TOKEN_LABELS, weights, metrics=None, optimizer=sgd)
    assert_same(of._replace(rows=96))


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
    run = spread(case(normalized, rows=96, metrics=None, fit={"epochs": 1}))
    mean, variance = np.zeros(problems.FEATURES), np.ones(problems.FEATURES)
    for rows in (X[:48], X[48:96]):
        mean = 0.7 * mean + 0.3 * rows.mean(0)
        variance = 0.7 * variance + 0.3 * rows.var(0)
    for found, due in zip(run.model.non_trainable_variables, (mean, variance), strict=True):
        np.testing.assert_allclose(found.numpy(), due, rtol=1e-12)


def losses_of_all_rows():
    # Dice compares each row of predictions with the same row of targets.
    assert_same(coupled.HEADS._replace(rows=40, sizes={"microbatch_size": 2}))


def kernels_over_devices():
    run = assert_same(case(optimizer=adam), model_parallel)
    kernel = run.model.layers[0].kernel.value
    assert kernel.sharding.spec[0] == "model", kernel.sharding


def _program(distribution):
    """The text of what one of four devices runs for 1024 rows of 24 columns."""
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
        text = _program(keras.distribution.distribution())
    rows = set(re.findall(r"= f64\[(\d+),\d+\]\S* dot\(", text))
    assert "32" in rows, rows
    # Those of a micro-batch on all devices, of a device, of all.
    assert not rows & {"128", "256", "1024"}, rows
    # Gradients and what metrics count, in the loop; no row moves to another device.
    found = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", text)
    assert found == ["all-reduce"], found


def rows_that_devices_do_not_divide():
    with pytest.raises(ValueError, match=r"partitioned 4 times"):
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


def what_runs_out_of_memory_runs_again():
    x, y = running_out.X[:48], running_out.Y[:48]

    def trained(size, fail=()):
        model = running_out.model(running_out.Points(fail))
        vb.accumulate(model, microbatch_size=size)
        model.fit(x, y, batch_size=48, epochs=2, shuffle=False, verbose=0)
        return model.train_step.most, running_out.state(model)

    with data_parallel().scope():
        most, found = trained(8, [0])
        assert most == 4
        running_out.assert_same(found, trained(4)[1])


def a_planned_size():
    planner.BUDGET = TimeBudget(seconds=0.0)
    with data_parallel().scope():
        model = _compiled()
        plan = vb.plan(model, (X[:64], LABELS[:64]))
        # On each device there are 16.
        assert plan.microbatch_size == max(row.microbatch_size for row in plan.rows) == 16
        vb.accumulate(model, microbatch_size="auto")
        model.fit(X[:64], LABELS[:64], batch_size=64, verbose=0)
        assert model.train_step.most == 16


def _compiled():
    keras.utils.set_random_seed(1)
    model = classifier()
    model.compile("sgd", problems.crossentropy())
    return model


def a_certificate():
    with data_parallel().scope():
        found = vb.certify(_compiled(), (X[:32], LABELS[:32]), microbatch_size=8)
    assert found.exact, found


def noise():
    def told(rows, size):
        seen, model = test_noise.Seen(), _compiled()
        vb.accumulate(model, microbatch_size=size)
        options = {"shuffle": False, "callbacks": [seen], "verbose": 0}
        model.fit(X[rows], LABELS[rows], batch_size=len(rows), **options)
        return seen.stats

    with data_parallel().scope():
        found = told(np.arange(64), 4)
    # The micro-batches of one device that have the same rows.
    due = told(np.arange(64).reshape(4, 4, 4).swapaxes(0, 1).reshape(-1), 16)
    np.testing.assert_allclose(found, due, rtol=1e-10)


def rows_drop_features_of_their_own():
    keras.utils.set_random_seed(1)
    with data_parallel().scope():
        outputs = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.5), outputs])
        model.compile(keras.optimizers.SGD(1.0), lambda y_true, y_pred: y_pred[:, 0])
        vb.accumulate(model, microbatch_size=1)
        model.train_on_batch(np.ones((8, 64)), np.zeros(8))
        kept = -4 * outputs.kernel.numpy()[:, 0]
    # Of 8 rows, two on each device. Alike on all devices, or in both micro-batches, each number
    # would be a multiple of 4, or of 2.
    assert set(np.round(kept)) >= {2, 3, 4, 5, 6}, kept


def the_first_batch_says_how_it_is_cut():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("virtualbatch").addHandler(handler)
    spread(case(sizes={"microbatch_size": 12}, rows=BATCH))
    assert lines == [
        "A batch of 48 rows is one micro-batch of microbatch_size=12 on each of 4 devices, so "
        "nothing is accumulated. One batch of fit is one update: did you mean "
        "fit(batch_size=192)?"
    ]


if __name__ == "__main__":
    alone()
    assert len(jax.devices()) == DEVICES
    for name in sys.argv[1:]:
        globals()[name]()
        print("ok", name, flush=True)
