"""Peak memory is that of one micro-batch: nothing of an earlier one stays, and nothing waits."""

import gc
import weakref

import keras
import numpy as np
import pytest
import torch
from keras import layers
from tests.keras import problems
from tests.keras.problems import FEATURES, compiled, crossentropy
from torch.utils._python_dispatch import TorchDispatchMode

import virtualbatch.keras as vb

SIZE = 16


class Saved:
    """Bytes that PyTorch holds for backward passes, now and at the most."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        # Detached: an output that its own graph holds would only be freed by the collector.
        holder = _Holder(tensor.detach())
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(holder, self._freed, size)
        return holder

    def _freed(self, size):
        self.now -= size


class _Holder:
    def __init__(self, tensor):
        self.tensor = tensor


def unpack(holder):
    return holder.tensor


def with_everything():
    """BatchNorm, masks, activity losses and metrics: all that could hold a graph."""
    return keras.Sequential(
        [
            keras.Input((None, 4)),
            layers.Masking(),
            layers.Dense(32, activation="tanh", activity_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dense(3),
        ]
    )


def plain():
    return problems.classifier()


class OwnMetrics(keras.Model):
    """Returns a number that holds the graph of its micro-batch."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3)

    def call(self, inputs):
        return self.out(inputs)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {"largest": y_pred.max()}


def data(make, rows):
    random = np.random.default_rng(0)
    if make is with_everything:
        return random.normal(size=(rows, 7, 4)), random.integers(0, 3, size=(rows, 7))
    return random.normal(size=(rows, FEATURES)), random.integers(0, 3, size=rows)


def peak(make, count):
    keras.utils.set_random_seed(0)
    model = make()
    model.compile(**compiled(metrics=None if make is OwnMetrics else ["accuracy"])())
    x, y = data(make, SIZE * count)
    model.train_on_batch(x[:SIZE], y[:SIZE])
    vb.accumulate(model, microbatch_size=SIZE)
    gc.collect()
    saved = Saved()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, unpack):
            model.train_on_batch(x, y)
    finally:
        gc.enable()
    return saved.peak


@pytest.mark.parametrize("make", [plain, with_everything, OwnMetrics])
def test_the_peak_is_that_of_one_micro_batch(make):
    few, many = peak(make, 2), peak(make, 32)
    assert 0 < many <= few


class Reads(TorchDispatchMode):
    """Counts how often the host reads a value, for which it waits."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [plain, with_everything])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_no_value_is_read_per_micro_batch(make, optimizer):
    counts = []
    for count in (2, 8):
        model = make()
        model.compile(optimizer, crossentropy(), metrics=["accuracy"])
        x, y = data(make, SIZE * count)
        vb.accumulate(model, microbatch_size=SIZE)
        model.train_on_batch(x, y)
        with Reads() as reads:
            model.train_step((x, y))
        counts.append(reads.count)
    assert counts[0] == counts[1]
