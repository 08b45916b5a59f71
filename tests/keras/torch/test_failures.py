"""A window that fails leaves no trace: nothing is committed before all of it has succeeded."""

import keras
import numpy as np
import pytest
import torch
from keras import layers
from tests.keras.problems import FEATURES, LABELS, X, crossentropy

import virtualbatch.keras as vb


class FailsAt(layers.Layer):
    """Raises in one of its forwards."""

    def __init__(self):
        super().__init__()
        self.forwards_left = None

    def call(self, inputs):
        if self.forwards_left is not None:
            self.forwards_left -= 1
            if self.forwards_left == 0:
                raise FloatingPointError("of the user")
        return inputs


class Watching(layers.Layer):
    """Keeps a metric of its own."""

    def __init__(self):
        super().__init__()
        self.size = keras.metrics.Mean(name="size")

    def call(self, inputs):
        self.size.update_state(inputs)
        return inputs


def made(microbatch_size):
    failing = FailsAt()
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            Watching(),
            layers.Dropout(0.5),
            layers.BatchNormalization(),
            layers.TorchModuleWrapper(torch.nn.BatchNorm1d(FEATURES, dtype=torch.float64)),
            layers.Dense(3),
            failing,
        ]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    vb.accumulate(model, microbatch_size=microbatch_size)
    model.fit(X, LABELS, batch_size=50, verbose=0)
    return model, failing


def everything(model):
    tracked = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    values = [keras.ops.convert_to_numpy(v.value).copy() for v in tracked]
    module = model.layers[3].module
    return values + [buffer.numpy().copy() for buffer in module.buffers()]


@pytest.mark.parametrize(("microbatch_size", "at"), [(16, 1), (16, 2), (16, 4), (50, 1)])
def test_a_micro_batch_that_raises_changes_nothing(microbatch_size, at):
    model, failing = made(microbatch_size)
    before = everything(model)
    gradients = [(v.value.grad, v.value.grad.clone()) for v in model.trainable_variables]
    failing.forwards_left = at
    with pytest.raises(FloatingPointError, match="of the user"):
        model.train_step((torch.tensor(X[:50]), torch.tensor(LABELS[:50])))
    for found, due in zip(everything(model), before, strict=True):
        np.testing.assert_array_equal(found, due)
    for variable, (gradient, value) in zip(model.trainable_variables, gradients, strict=True):
        assert variable.value.grad is gradient
        assert torch.equal(gradient, value)
    # Nor does anything still listen.
    assert all("_moments" not in vars(layer) for layer in model.layers)
    model.fit(X, LABELS, batch_size=50, verbose=0)
    assert int(model.optimizer.iterations) == 6


def test_an_optimizer_that_raises_leaves_metrics_and_statistics():
    model, _ = made(16)
    before = everything(model)

    class Broken(type(model.optimizer)):
        def apply(self, grads, trainable_variables=None):
            raise FloatingPointError("of the optimizer")

    model.optimizer.__class__ = Broken
    with pytest.raises(FloatingPointError, match="of the optimizer"):
        model.train_step((torch.tensor(X[:50]), torch.tensor(LABELS[:50])))
    for found, due in zip(everything(model), before, strict=True):
        np.testing.assert_array_equal(found, due)


def test_an_update_that_was_made_is_not_made_again():
    # Of a whole batch, Keras counts metrics after the update.
    class Failing(keras.metrics.Mean):
        def update_state(self, y, found, sample_weight=None):
            # Keras first tries it on tensors without values.
            if isinstance(found, torch.Tensor) and found.device.type != "meta":
                raise torch.OutOfMemoryError("CUDA out of memory")

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse", metrics=[Failing()])
    vb.accumulate(model, microbatch_size=8)
    with pytest.raises(torch.OutOfMemoryError):
        model.train_on_batch(np.ones((8, 3)), np.ones((8, 1)))
    assert int(model.optimizer.iterations) == 1
