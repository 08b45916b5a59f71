"""certify_loop on loops as people write them for TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf

import virtualbatch.tensorflow as vb

RNG = np.random.default_rng(0)
BATCHES = [{"x": RNG.normal(size=(12, 5)), "y": RNG.normal(size=(12, 2))} for _ in range(2)]


class Training:
    """A loop with a buffer of its own, as in many answers on the web."""

    def __init__(self, divisor=lambda held, steps: held, clear=True, clip=None, compiled=False):
        start = np.random.default_rng(1)
        self.weights = [
            tf.Variable(start.normal(size=(5, 2)), name="w"),
            tf.Variable(np.zeros(2), name="b"),
        ]
        self.buffers = [tf.Variable(tf.zeros_like(v)) for v in self.weights]
        self.divisor, self.clear, self.clip = divisor, clear, clip
        self.micro = tf.function(self.of_one) if compiled else self.of_one

    def state(self):
        return {"weights": self.weights, "buffers": self.buffers}

    def of_one(self, batch, divisor):
        with tf.GradientTape() as tape:
            output = tf.tanh(batch["x"] @ self.weights[0]) + self.weights[1]
            loss = tf.reduce_mean((output - batch["y"]) ** 2) / divisor
        gradients = tape.gradient(loss, self.weights)
        if self.clip:
            gradients, _ = tf.clip_by_global_norm(gradients, self.clip)
        for buffer, gradient in zip(self.buffers, gradients, strict=True):
            buffer.assign_add(gradient)

    def loop(self, microbatches, accumulation_steps):
        for buffer in self.buffers:
            buffer.assign(tf.zeros_like(buffer))
        for first in range(0, len(microbatches), accumulation_steps):
            window = microbatches[first : first + accumulation_steps]
            divisor = tf.constant(self.divisor(len(window), accumulation_steps), tf.float64)
            for piece in window:
                self.micro(piece, divisor)
            for weight, buffer in zip(self.weights, self.buffers, strict=True):
                weight.assign_sub(0.1 * buffer)
                if self.clear:
                    buffer.assign(tf.zeros_like(buffer))


@pytest.mark.parametrize("compiled", [False, True])
def test_no_false_alarm(compiled):
    training = Training(compiled=compiled)
    before = [v.numpy() for v in training.weights]
    found = vb.certify_loop(training.loop, BATCHES, microbatch_size=3, **training.state())
    assert found.findings == (), found
    assert found.exact
    assert "weights.w:0" in found.parameters
    for variable, due in zip(training.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), due)


@pytest.mark.parametrize(
    ("options", "size", "kind"),
    [
        ({}, 5, "weight"),
        ({"divisor": lambda held, steps: 1.0}, 3, "sum_loss"),
        ({"divisor": lambda held, steps: steps}, 3, "last_window"),
        ({"clear": False}, 3, "stale_buffer"),
        ({"clip": 0.01}, 3, "sum_loss"),
    ],
)
def test_the_mistake_is_named(options, size, kind):
    training = Training(**options)
    state = {"weights": training.weights, "buffers": training.buffers}
    found = vb.certify_loop(training.loop, BATCHES, microbatch_size=size, **state)
    assert [finding.kind for finding in found.findings] == [kind], found
