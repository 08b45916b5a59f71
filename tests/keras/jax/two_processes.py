"""One of two processes, of two devices each, in which Keras trains a model on rows of its own.

Run by test_devices.py: `python -m tests.keras.jax.two_processes CHECK NUMBER PORT`.
"""

import sys

# Keras would load it to set a seed, which takes longer than the check.
sys.modules["tensorflow"] = None

import jax
import keras
import numpy as np
from keras.src.backend.common import dtypes
from tests.keras.problems import LABELS, ROW_WEIGHTS, X, classifier, crossentropy

import virtualbatch.keras as vb

ROWS, EPOCHS = 48, 3


def trained(own, size):
    """(weights, losses) of a model trained on the rows of all processes."""
    keras.utils.set_random_seed(1)
    model = classifier()
    optimizer = keras.optimizers.Adam(0.01, global_clipnorm=0.1)
    model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    if size:
        vb.accumulate(model, microbatch_size=size)
    history = model.fit(
        X[own],
        LABELS[own],
        sample_weight=ROW_WEIGHTS[own],
        batch_size=len(own),
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
    )
    return [np.asarray(v.value) for v in model.weights], history.history


def exact(number):
    due, losses = trained(np.arange(ROWS), None)
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    found, history = trained(np.arange(ROWS // 2) + number * ROWS // 2, 5)
    for a, b in zip(found, due, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(history["loss"], losses["loss"], rtol=1e-10)
    np.testing.assert_allclose(history["accuracy"], losses["accuracy"], rtol=1e-10)


def mean_error(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred))


def own_loss(number):
    def run(own, size):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6, activation="sigmoid")])
        model.compile("sgd", mean_error)
        if size:
            vb.accumulate(model, microbatch_size=size, gather=False)
        model.fit(X[own], X[own], batch_size=len(own), epochs=2, shuffle=False, verbose=0)
        return [np.asarray(v.value) for v in model.weights]

    due = run(np.arange(ROWS), None)
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    found = run(np.arange(ROWS // 2) + number * ROWS // 2, 5)
    for a, b in zip(found, due, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    check, number, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(f"127.0.0.1:{port}", 2, number)
    # Keras on JAX rounds means of float64 to float32: see tests/keras/conftest.py.
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    globals()[check](number)
    print("ok", flush=True)
