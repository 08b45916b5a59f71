"""A model whose windows run out of memory where they are told to, on every backend."""

import keras
import numpy as np
from tests.keras.backends import BACKEND

BATCH, ROWS = 24, 60
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 6))
Y = RNG.integers(0, 3, ROWS)


def out_of_memory():
    """What the backend raises."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.errors.ResourceExhaustedError(
            None, None, "OOM when allocating tensor with shape[4,6] and type float"
        )
    if BACKEND == "jax":
        import jax

        return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def ambiguous():
    """What the backend raises where memory may have run out."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.errors.AbortedError(
            None, None, "Status: 1, message: could not create a primitive"
        )
    if BACKEND == "jax":
        import jax

        return jax.errors.JaxRuntimeError("INTERNAL: YNNPACK operation failed")
    return RuntimeError("could not create a primitive")


class Points:
    """Counts places where memory may run out, and lets it run out at some."""

    def __init__(self, fail=(), error=out_of_memory):
        self.fail, self.error, self.count = set(fail), error, 0

    def __call__(self):
        self.count += 1
        if self.count - 1 in self.fail:
            raise self.error()


class Model(keras.Model):
    """A network with all that changes while it trains.

    Where Keras compiles, a window runs out of memory after it has run: whatever it writes is then
    written, and what it was given is gone. On PyTorch it does so in a forward or a backward.
    """

    def __init__(self, points):
        super().__init__()
        self.points = points
        self.first = keras.layers.Dense(8, activation="tanh")
        self.norm = keras.layers.BatchNormalization(momentum=0.7)
        self.dropout = keras.layers.Dropout(0.3, seed=3)
        self.last = keras.layers.Dense(3)

    def call(self, x, training=False):
        x = self.dropout(self.norm(self.first(x), training=training), training=training)
        if BACKEND == "torch" and training and x.requires_grad:
            self.points()
            x.register_hook(lambda gradient: self.points())
        return self.last(x)

    def make_train_function(self, force=False):
        super().make_train_function(force=force)
        if BACKEND == "torch" or getattr(self.train_function, "fails", False):
            return
        run = self.train_function

        def train_function(*given):
            result = run(*given)
            self.points()
            return result

        train_function.fails = True
        self.train_function = train_function


def model(points=None):
    keras.utils.set_random_seed(1)
    found = Model(points or Points())
    found.compile(
        optimizer=keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return found


def state(found):
    """Every value of a model, its optimizer and its metrics."""
    variables = [*found.variables, *found.optimizer.variables, *found.metrics_variables]
    return [np.array(keras.ops.convert_to_numpy(variable.value)) for variable in variables]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
