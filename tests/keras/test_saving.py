"""A saved model does not know of virtualbatch; nor do copies but deep ones, see test_copies.py."""

import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from tests.keras import problems
from tests.keras.backends import BACKEND
from tests.keras.problems import X, compiled
from tests.oracle import assert_all_close

import virtualbatch.keras as vb

LABELS = problems.LABELS

# Goes on where the first process stopped, without being able to import what it used there.
CONTINUE = """
import sys
sys.modules["virtualbatch"] = None
import keras, numpy
keras.config.set_floatx("float64")
keras.src.backend.common.dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
data = numpy.load("data.npz")
model = keras.models.load_model("model.keras")
assert type(model).train_step is keras.Model.train_step and "train_step" not in vars(model)
assert int(model.optimizer.iterations) == 6, model.optimizer.iterations
model.fit(data["x"], data["y"], batch_size=50, epochs=2, verbose=0, shuffle=False)
numpy.savez("weights.npz", *model.get_weights())
"""


def model_with_everything():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((problems.FEATURES,)),
            layers.Dense(4, activation="tanh", kernel_regularizer="l2"),
            layers.Dense(3),
        ]
    )
    model.compile(**compiled(optimizer="adam")())
    return model


def fit(model):
    model.fit(X, LABELS, batch_size=50, epochs=2, verbose=0, shuffle=False)


@pytest.mark.thorough("starts another process, which imports Keras")
def test_a_process_without_virtualbatch_goes_on(tmp_path):
    model = model_with_everything()
    vb.accumulate(model, microbatch_size=16)
    fit(model)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=X, y=LABELS)
    child = subprocess.run(
        [sys.executable, "-c", CONTINUE],
        cwd=tmp_path,
        env=os.environ | {"KERAS_BACKEND": BACKEND, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr

    uncut = model_with_everything()
    fit(uncut)
    fit(uncut)
    with np.load(tmp_path / "weights.npz") as found:
        assert_all_close([found[name] for name in found.files], uncut.get_weights(), 1e-10)
    # Saving took nothing away from the model that goes on accumulating.
    fit(model)
    assert_all_close(model.get_weights(), uncut.get_weights(), 1e-10)


COPIES = {
    "clone_model": keras.models.clone_model,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "from_config": lambda model: type(model).from_config(model.get_config()),
}
FURTHER = pytest.mark.thorough("another way to copy what pickle copies")


@pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copied, id=name, marks=() if name == "pickle" else FURTHER)
        for name, copied in COPIES.items()
    ],
)
def test_copies_are_plain(duplicate):
    model = model_with_everything()
    vb.accumulate(model, microbatch_size=16)
    fit(model)
    twin = duplicate(model)
    assert "train_step" not in vars(twin)
    assert vars(model)["train_step"] is model.train_step
    if duplicate is COPIES["pickle"]:
        assert twin.compiled
        assert_all_close(twin.get_weights(), model.get_weights())
        fit(twin)
        fit(model)
        assert_all_close(twin.get_weights(), model.get_weights(), 1e-10)


def test_weights_are_saved_and_loaded(tmp_path):
    model = model_with_everything()
    vb.accumulate(model, microbatch_size=16)
    fit(model)
    model.save_weights(tmp_path / "model.weights.h5")
    weights = model.get_weights()
    fit(model)
    model.load_weights(tmp_path / "model.weights.h5")
    assert_all_close(model.get_weights(), weights)
