"""Keras models on JAX whose batches are spread over four devices by `keras.distribution`.

Named checks, run by test_devices.py in processes of their own: devices are made when JAX starts.
The reference is plain Keras on one of them.
"""

import re
import sys
import warnings
from functools import partial

import jax
import keras
import numpy as np
from keras import layers
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel
from keras.src.backend.common import dtypes
from tests.keras import coupled, problems
from tests.keras.problems import FEATURES, LABELS, ROW_WEIGHTS, X, classifier, compiled, tagger
from tests.keras.training import Case, assert_same_run, eagerly, train

import virtualbatch.keras as vb

DEVICES = 4
# On each device 12 rows a batch, cut into 5 5 2; the last batch of an epoch has 6, cut into 5 1.
ROWS, BATCH, MICRO = 120, 48, 5
FIT = {"batch_size": BATCH, "epochs": 3}
SIZES = {"microbatch_size": MICRO}


def data_parallel():
    return DataParallel(auto_shard_dataset=False)


def model_parallel(path=".*dense.*kernel"):
    mesh = DeviceMesh((2, 2), ("rows", "model"), keras.distribution.list_devices())
    layout = LayoutMap(mesh)
    layout[path] = (None, "model")
    return ModelParallel(layout_map=layout, batch_dim_name="rows", auto_shard_dataset=False)


def spread(case, distribution=data_parallel):
    """The run of a case whose batches are spread, by micro-batches."""
    with distribution().scope():
        return train(case, accumulated=True)


def assert_same(case, distribution=data_parallel):
    """Raises unless a case over devices gives what plain Keras gives on one."""
    assert_same_run(spread(case, distribution), train(eagerly(case), accumulated=False))


def case(model=classifier, x=X, y=LABELS, fit=None, sizes=SIZES, rows=ROWS, **options):
    return Case("", model, compiled(**options), x, y, FIT | (fit or {}), sizes, rows=rows)


def clipped():
    return keras.optimizers.AdamW(0.01, global_clipnorm=0.1, use_ema=True)


def rows_of_all_devices():
    assert_same(case(optimizer=clipped, fit={"sample_weight": ROW_WEIGHTS}))
    # Weights and masks differ from device to device: the first has no word in its rows.
    ids = np.where(np.arange(ROWS)[:, None] % BATCH < 12, 0, problems.WORD_IDS[:ROWS])
    assert_same(case(tagger, ids, problems.TOKEN_LABELS, metrics=None))


def program(model, batch):
    """The text of a train step's program, for a batch that is spread."""
    distribution = keras.distribution.distribution()
    distribution = keras.distribution.distribution()
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    if distribution is not None:
        layouts = [distribution.get_data_layout(x.shape) for x in batch]
        batch = tuple(map(keras.distribution.distribute_tensor, batch, layouts))
    return jax.jit(model.train_step).lower(state, (*batch, None)).compile().as_text()


def _dense():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((32,)), layers.Dense(64), layers.Dense(16)])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def collectives(text):
    """Which there are, without those of numbers."""
    found = re.findall(r"= \(?\w+\[(\d[\d,]*)?.* (all-\w+|collective-\w+)\(", text)
    return [name for shape, name in found if shape]


def every_device_computes_its_own_rows():
    batch = np.zeros((1024, 32)), np.zeros((1024, 16))
    with data_parallel().scope():
        model = _dense()
        vb.accumulate(model, microbatch_size=32)
        text = program(model, batch)
        open('/tmp/kj.hlo','w').write(text); print(set(re.findall(r"f64\[(\d+),\d+\]\S* dot\(", text)), collectives(text))


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
    for name in sys.argv[1:]:
        t=time.time()
        globals()[name]()
        print("ok", name, time.time()-t)
