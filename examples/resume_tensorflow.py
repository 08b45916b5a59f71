"""TensorFlow: a training that may be killed at any moment, and goes on to the same bits.

Kill it and start it again, as often as you like: its last line stays the same. The checkpoint is
TensorFlow's own. It holds the iterator too, whose buffer has rows that were read and not yet given.
"""

import hashlib
import os
import shutil

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import virtualbatch.tensorflow as vb
from virtualbatch import windows

UPDATES, EVERY, FOLDER = 36, 4, "resume_tensorflow"  # a checkpoint after every fourth update
x = tf.random.stateless_normal([1500, 20], [0, 0])
y = tf.argmax(x[:, :3] + x[:, 3:6] ** 2, 1)
rows = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(1500, seed=0).repeat(3)
iterator = iter(rows.batch(32))
first = tf.Variable(tf.random.stateless_normal([20, 32], [0, 1]) / 5)
last = tf.Variable(tf.random.stateless_normal([32, 3], [0, 2]) / 5)
optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, UPDATES))
optimizer.build([first, last])
random = tf.random.Generator.from_seed(0)
updates = tf.Variable(0)


def loss_fn(batch):
    x, y = batch
    hidden = tf.nn.relu(x @ first)
    # Of tf.random.uniform, the state is in no checkpoint.
    kept = random.uniform(tf.shape(hidden)) < 0.8
    logits = tf.where(kept, hidden / 0.8, 0.0) @ last
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))


@tf.function
def update(window):
    _, gradients = vb.value_and_gradients(loss_fn, window, [first, last])
    optimizer.apply_gradients(zip(gradients, [first, last], strict=True))
    updates.assign_add(1)


parts = {"first": first, "last": last, "optimizer": optimizer, "random": random}
saved = tf.train.Checkpoint(**parts, updates=updates, iterator=iterator)
manager = tf.train.CheckpointManager(saved, FOLDER, max_to_keep=2)
manager.restore_or_initialize()
print(f"begins after {int(updates)} updates", flush=True)
if int(updates) < UPDATES:  # an empty stream has no window
    for window in windows(iterator, accumulation_steps=4):  # reads no more than the window
        update(window)
        if int(updates) % EVERY == 0:
            manager.save()
weights = hashlib.sha256(first.numpy().tobytes() + last.numpy().tobytes())
print(f"{int(updates)} updates, weights {weights.hexdigest()[:16]}")
shutil.rmtree(FOLDER)
