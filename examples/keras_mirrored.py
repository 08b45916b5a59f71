"""Keras `fit` on two replicas, of which one has no row of the last batch.

Two logical CPUs stand for two GPUs. Prints how far the weights are from those of one device.
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import virtualbatch.keras as vb

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

# Sentences of words 1 to 9, padded by 0, and a class for every word.
rng = np.random.default_rng(0)
words = rng.integers(1, 10, (33, 6)) * (np.arange(6) < rng.integers(1, 7, (33, 1)))
classes = words % 3


def build():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Embedding(10, 8, mask_zero=True),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    optimizer = keras.optimizers.Adam(0.05, global_clipnorm=0.1)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return model


def trained(model):
    # 33 rows in batches of 16: the last one has 1 row, for the first replica.
    model.fit(words, classes, batch_size=16, epochs=3, shuffle=False, verbose=0)
    return [variable.numpy() for variable in model.variables]


def distance(a, b):
    return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))


one_device = trained(build())

with strategy.scope():
    plain = build()
    model = build()
vb.accumulate(model, microbatch_size=4)  # rows of one forward and backward, on one device
print(f"plain Keras on two replicas: weights differ by {distance(trained(plain), one_device):.0e}")
print(f"accumulate on two replicas:  weights differ by {distance(trained(model), one_device):.0e}")
