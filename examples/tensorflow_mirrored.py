"""TensorFlow: a loop inside `strategy.run`, on two devices, trains as one device does.

The loss is a mean over the words of sentences, of which each device has another number, and the
last batch leaves a device without rows. Two logical CPUs stand for two GPUs.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import virtualbatch.tensorflow as vb

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
random = np.random.default_rng(0)
ids = random.integers(20, size=(65, 12))
mask = (np.arange(12) < random.integers(1, 13, size=(65, 1))).astype("float32")
dataset = tf.data.Dataset.from_tensor_slices((ids, (ids * 3 + 1) % 20, mask)).batch(32)


def trained(strategy, dataset):
    """Losses of five epochs, and the weights after them."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input((12,)), keras.layers.Embedding(20, 20)])
        optimizer = keras.optimizers.Adam(0.05)
        optimizer.build(model.trainable_variables)

    def loss_fn(batch):
        x, y, mask = batch
        losses = keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)
        return tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)

    def replica(batch):
        weights, words = model.trainable_variables, lambda batch: tf.reduce_sum(batch[2])
        loss, gradients = vb.value_and_gradients(
            loss_fn, batch, weights, microbatch_size=8, weight=words
        )
        # These are this device's part of the gradients; apply_gradients adds the parts up.
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return loss

    update = tf.function(lambda batch: strategy.run(replica, args=(batch,)))
    batches = [batch for _ in range(5) for batch in dataset]
    # The loss is that of the whole batch, the same on all devices.
    losses = [float(strategy.experimental_local_results(update(batch))[0]) for batch in batches]
    return losses, model.get_weights()[0]


one, weights = trained(tf.distribute.OneDeviceStrategy("CPU:0"), dataset)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
two, same = trained(strategy, strategy.experimental_distribute_dataset(dataset))
print("one device: ", *(f"{loss:.4f}" for loss in one[::3]))
print("two devices:", *(f"{loss:.4f}" for loss in two[::3]))
assert np.abs(weights - same).max() < 1e-5
