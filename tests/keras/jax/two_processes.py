"""One of two processes, of two devices each, in which Keras trains a model on rows of its own.

Run by test_devices.py: `python -m tests.keras.jax.two_processes CHECK NUMBER PORT`.
"""

import sys

import jax
import keras
import numpy as np
import pytest
from tests.keras import running_out
from tests.keras.jax.alone import alone
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


def refused(number):
    """No process may plan, or run a batch again, by itself."""
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    with pytest.raises(ValueError, match=r"planned in one process.*Got 2 processes\. Pass what"):
        trained(np.arange(ROWS // 2) + number * ROWS // 2, "auto")

    model = running_out.model(running_out.Points([0]))
    vb.accumulate(model, microbatch_size=5)
    own = np.arange(24) + 24 * number
    with pytest.raises(
        RuntimeError, match=r"out-of-memory error in one of 2 processes\. Pass a smaller"
    ):
        model.fit(running_out.X[own], running_out.Y[own], batch_size=24, verbose=0)


if __name__ == "__main__":
    check, number, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    alone()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(f"127.0.0.1:{port}", 2, number)
    globals()[check](number)
    print("ok", check, flush=True)
