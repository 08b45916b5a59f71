"""What `accumulate` refuses and advises instead: micro-batches inside a train_step of one's own."""

import keras
from keras import layers, ops
from tests.keras.problems import FEATURES, TARGETS, X
from tests.oracle import assert_close

import virtualbatch.jax as vb


class OwnStep(keras.Sequential):
    """A train_step as Keras' guide for JAX writes it."""

    microbatch_size = None

    def train_step(self, state, data):
        trainable, non_trainable, optimizer, metrics = state

        def loss_fn(trainable, batch):
            x, y = batch
            y_pred, _ = self.stateless_call(trainable, non_trainable, x, training=True)
            return ops.mean(ops.square(y_pred - y))

        step = vb.value_and_grad(loss_fn, microbatch_size=self.microbatch_size)
        loss, gradients = step(trainable, data)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        return {"loss": loss}, (trainable, non_trainable, optimizer, metrics)


def test_it_equals_the_whole_batch():
    def trained(microbatch_size):
        keras.utils.set_random_seed(1)
        model = OwnStep([keras.Input((FEATURES,)), layers.Dense(2)])
        model.microbatch_size = microbatch_size
        model.compile("sgd")
        model.fit(X[:100], TARGETS[:100], batch_size=50, verbose=0, shuffle=False)
        return model.get_weights()

    for found, due in zip(trained(16), trained(50), strict=True):
        assert_close(found, due, 1e-12)
