"""Keras on JAX: the same added line, where Keras compiles a whole batch into one program.

Trains a small convolutional network on digits twice, with whole batches and with micro-batches,
and shows that the weights agree to rounding.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits

import virtualbatch.keras as vb

images, labels = load_digits(return_X_y=True)
x, y = (images / 16).astype("float32").reshape(-1, 8, 8, 1), labels


def trained(microbatch_size: int | None) -> tuple[keras.Model, keras.callbacks.History]:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="tanh", padding="same"),
            keras.layers.Conv2D(16, 3, strides=2, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    if microbatch_size is not None:
        vb.accumulate(model, microbatch_size=microbatch_size)
    # 1,797 rows: the last batch of an epoch has 5, and is an update like any other.
    return model, model.fit(x, y, batch_size=128, epochs=3, verbose=0)


whole, whole_history = trained(None)
cut, cut_history = trained(32)
difference = max(
    np.abs(a - b).max() for a, b in zip(whole.get_weights(), cut.get_weights(), strict=True)
)
print(f"updates: {int(whole.optimizer.iterations)} whole, {int(cut.optimizer.iterations)} cut")
for name, values in whole_history.history.items():
    print(f"{name}: {values[-1]:.6f} whole, {cut_history.history[name][-1]:.6f} cut")
print(f"largest difference between the weights: {difference:.1e}")
if difference > 1e-4:
    raise SystemExit("The weights differ by more than rounding.")
