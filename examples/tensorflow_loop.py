"""TensorFlow: a GradientTape loop over a dataset that is already batched by 32.

Four batches of 32 make one update of 128. `windows` groups them; the last window is short, and
the loop checks that it was used.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

import virtualbatch.tensorflow as vb
from virtualbatch import windows

images, labels = load_digits(return_X_y=True)
x, y = (images / 16).astype("float32"), labels.astype("int64")
dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0).batch(32)

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.layers.Input((64,)),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ]
)
optimizer = keras.optimizers.Adam(0.003)
optimizer.build(model.trainable_variables)
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def loss_fn(batch):
    x, y = batch
    logits = model(x, training=True)
    correct = tf.reduce_sum(tf.cast(tf.argmax(logits, -1) == y, tf.int32))
    return loss_of(y, logits), {"correct": correct}


@tf.function
def update(window):
    (loss, aux), gradients = vb.value_and_gradients(
        loss_fn, window, model.trainable_variables, has_aux=True
    )
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    return loss, aux["correct"]


for epoch in range(5):
    rows = correct = updates = 0
    for window in windows(dataset, accumulation_steps=4):
        loss, right = update(window)
        rows += sum(len(labels) for _, labels in window)
        correct, updates = correct + int(right), updates + 1
    print(f"epoch {epoch}: {updates} updates, loss {loss:.3f}, accuracy {correct / rows:.3f}")
    assert rows == len(x), "rows were left out"
    assert len(window) == 1, "the last window was not the short one"
