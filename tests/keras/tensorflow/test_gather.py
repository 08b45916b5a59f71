"""What only TensorFlow draws: random numbers whose state nobody can put back."""

import keras
import pytest
import tensorflow as tf
from keras import layers
from tests.keras.coupled import FEATURES, MASKS, MICRO, X

import virtualbatch.keras as vb


def test_random_numbers_that_cannot_be_drawn_again_are_refused():
    class Hidden(layers.Layer):
        def call(self, x, training=False):
            return tf.nn.dropout(x, 0.3) if training else x

    model = keras.Sequential([keras.Input((FEATURES,)), Hidden(), layers.Dense(6, "sigmoid")])
    model.compile("sgd", keras.losses.Dice())
    vb.accumulate(model, microbatch_size=MICRO)
    with pytest.raises(ValueError, match=r"drawn again.* Got the operations RandomUniform, whose"):
        model.train_on_batch(X[:20], MASKS[:20])
