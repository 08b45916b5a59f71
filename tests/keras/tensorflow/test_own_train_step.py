"""What `accumulate` refuses and advises instead: micro-batches inside a train_step of one's own."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from tests.keras.problems import FEATURES, X
from tests.oracle import assert_close

import virtualbatch.tensorflow as vb

NOISE = np.random.default_rng(1).normal(size=X.shape)


class Adversarial(keras.Model):
    """A generator and its critic, with an optimizer each."""

    def __init__(self, microbatch_size):
        super().__init__()
        self.microbatch_size = microbatch_size
        self.generator = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(FEATURES)])
        self.critic = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(1, "tanh")])
        self.optimizers = keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01)

    def call(self, noise):
        return self.generator(noise)

    def train_step(self, data):
        def critic_loss(batch):
            real, noise = batch
            return tf.reduce_mean(self.critic(self.generator(noise)) - self.critic(real))

        def generator_loss(batch):
            return -tf.reduce_mean(self.critic(self.generator(batch[1])))

        steps = (critic_loss, self.critic), (generator_loss, self.generator)
        for optimizer, (loss_fn, part) in zip(self.optimizers, steps, strict=True):
            variables = part.trainable_variables
            loss, gradients = vb.value_and_gradients(
                loss_fn, data, variables, microbatch_size=self.microbatch_size
            )
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"loss": loss}


def test_two_optimizers_in_fit_equal_the_whole_batch():
    def trained(microbatch_size):
        keras.utils.set_random_seed(1)
        model = Adversarial(microbatch_size)
        model.compile(run_eagerly=microbatch_size == 50)
        model.fit(X[:100], NOISE[:100], batch_size=50, verbose=0, shuffle=False)
        return model.get_weights()

    for found, due in zip(trained(16), trained(50), strict=True):
        assert_close(found, due, 1e-12)
