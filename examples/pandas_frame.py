"""Keras on a pandas DataFrame: regression with sample weights, 256 rows an update, 64 at a time."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pandas as pd
from sklearn.datasets import load_diabetes

import virtualbatch.keras as vb

frame: pd.DataFrame = load_diabetes(as_frame=True).frame
target = frame.pop("target") / 100
# Rows with a high target are rare; their error counts twice.
importance = 1.0 + (target > 2.0)

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.layers.Input((frame.shape[1],)),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dense(1),
    ]
)
model.compile(
    optimizer=keras.optimizers.Adam(0.01), loss="mse", weighted_metrics=["mean_absolute_error"]
)
vb.accumulate(model, microbatch_size=64)
history = model.fit(
    frame, target, sample_weight=importance, batch_size=256, epochs=30, verbose=0
).history

print(f"{len(frame)} rows in batches of 256: {int(model.optimizer.iterations)} updates")
print(f"loss {history['loss'][0]:.3f} -> {history['loss'][-1]:.3f}")
if not history["loss"][-1] < history["loss"][0]:
    raise SystemExit("The loss did not fall.")

vb.restore(model)  # plain Keras again, with the same weights
model.evaluate(frame, target, sample_weight=importance, verbose=0)
