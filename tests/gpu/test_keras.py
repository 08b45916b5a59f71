"""Keras on a GPU, with the backend that `KERAS_BACKEND` names."""

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="Keras is not installed")


def has_gpu():
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.is_available()
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "gpu"
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


if not has_gpu():
    pytest.skip(f"Keras on {keras.backend.backend()} sees no GPU", allow_module_level=True)

import virtualbatch.keras as vb  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(70, 8, 8, 1)).astype("float32")
Y = RNG.integers(0, 3, 70)


def trained(size):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9), loss=loss, metrics=["accuracy"]
    )
    if size is not None:
        vb.accumulate(model, microbatch_size=size)
    logs = model.fit(X, Y, batch_size=32, epochs=3, shuffle=False, verbose=0).history
    return logs, model.get_weights(), int(model.optimizer.iterations)


@pytest.mark.parametrize("size", [1, 5, 8, "auto"])
def test_training_is_that_of_whole_batches(size):
    # Convolutions of a GPU round to tensor-float32, ten bits, unless asked not to.
    logs, weights, updates = trained(size)
    due_logs, due_weights, due_updates = trained(None)
    assert updates == due_updates == 9
    for name, values in due_logs.items():
        np.testing.assert_allclose(logs[name], values, rtol=2e-2, err_msg=name)
    for a, b in zip(weights, due_weights, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-3)
