"""Keras: a training that may be killed at any moment, and goes on to the same bits.

Kill it and start it again, as often as you like: its last line stays the same, on each backend.
Files of weights leave out the seeds of dropout, so all variables are saved, after each epoch.
"""

import hashlib
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import virtualbatch.keras as vb

EPOCHS, BATCH, FILE = 5, 128, Path("resume_keras.npz")
x = np.random.default_rng(0).normal(size=(700, 20)).astype("float32")
y = (x[:, :3] + x[:, 3:6] ** 2).argmax(1)

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((20,)),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(3),
    ]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(0.01), loss)
model.optimizer.build(model.trainable_variables)
vb.accumulate(model, microbatch_size=32)
variables = [*model.variables, *model.optimizer.variables]


def save():
    np.savez("aside.npz", *(keras.ops.convert_to_numpy(variable) for variable in variables))
    os.replace("aside.npz", FILE)  # in one move: a checkpoint is never half written


if FILE.exists():
    with np.load(FILE) as saved:
        for variable, value in zip(variables, saved.values(), strict=True):
            variable.assign(value)
updates = int(model.optimizer.iterations)
print(f"begins after {updates} updates", flush=True)
# The first `fit` of a process draws random numbers of its own, before the first epoch begins.
seeded = keras.callbacks.LambdaCallback(
    on_epoch_begin=lambda epoch, logs: keras.utils.set_random_seed(epoch)
)
for epoch in range(updates // -(-len(x) // BATCH), EPOCHS):
    order = np.random.default_rng(epoch).permutation(len(x))  # by its number alone
    epochs = {"initial_epoch": epoch, "epochs": epoch + 1, "shuffle": False}
    model.fit(x[order], y[order], batch_size=BATCH, callbacks=[seeded], verbose=0, **epochs)
    save()
weights = hashlib.sha256(b"".join(value.tobytes() for value in model.get_weights()))
print(f"{int(model.optimizer.iterations)} updates, weights {weights.hexdigest()[:16]}")
FILE.unlink()
