"""What PyTorch adds to losses that see all rows: its generator, its modules and its memory."""

import gc

import keras
import numpy as np
import pytest
import torch
from keras import layers
from tests.keras import coupled
from tests.keras.coupled import FEATURES, MICRO
from tests.keras.torch.test_memory import SIZE, Saved, unpack
from tests.oracle import assert_close

import virtualbatch.keras as vb
from virtualbatch.torch._random import RandomState

X, MASKS = coupled.X[:20], coupled.MASKS[:20]
CUT = (slice(0, 7), slice(7, 14), slice(14, 20))


class Drawing(layers.Layer):
    """Draws from PyTorch's own generator; notes whether a graph was wanted."""

    def __init__(self):
        super().__init__()
        self.graphs = []

    def call(self, x):
        self.graphs.append(torch.is_grad_enabled())
        return x * (1 + torch.rand_like(x))


class Noisy(keras.Sequential):
    """A model whose loss draws too."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        found = keras.losses.dice(y, y_pred)
        return found * (1 + torch.rand((), dtype=found.dtype, device=found.device))


def noisy():
    """BatchNorm of PyTorch and random numbers of its own generator."""
    norm = layers.TorchModuleWrapper(torch.nn.BatchNorm1d(FEATURES, momentum=0.5).double())
    out = layers.Dense(6, activation="sigmoid")
    return Noisy([keras.Input((FEATURES,)), norm, Drawing(), out])


def made(model=noisy, **options):
    keras.utils.set_random_seed(1)
    found = model()
    found.compile(keras.optimizers.SGD(1.0), **options)
    return found


def built(model):
    """The same model; what `fit` tries before its first batch draws random numbers."""
    model._symbolic_build(data_batch=(X, MASKS, None))
    model.layers[1].graphs.clear()
    return model


def test_an_update_is_that_of_the_same_microbatches_in_one_graph():
    """Both passes draw the same, what the loss drew stays drawn, and statistics move once."""
    expected, actual = made(), built(made())
    before = RandomState(None)
    y_pred = torch.cat([expected(torch.as_tensor(X[rows]), training=True) for rows in CUT])
    loss = expected.compute_loss(None, torch.as_tensor(MASKS), y_pred)
    loss.backward()
    following = torch.rand(())

    before.restore()
    vb.accumulate(actual, microbatch_size=MICRO)
    found = actual.train_step((X, MASKS))
    assert torch.rand(()) == following
    assert_close(float(found["loss"]), loss.detach().numpy(), 1e-12)
    for a, b in zip(actual.trainable_variables, expected.trainable_variables, strict=True):
        # One step of SGD at a rate of 1 subtracts the gradient.
        assert_close(a.numpy(), (b.value - b.value.grad).detach().numpy(), 1e-12)

    norm = actual.layers[0].module
    assert int(norm.num_batches_tracked) == 1
    assert_close(norm.running_mean.numpy(), X.mean(0) / 2, 1e-12)
    assert_close(norm.running_var.numpy(), 0.5 + X.var(0, ddof=1) / 2, 1e-12)
    # The first call looks for losses that see all rows.
    assert actual.layers[1].graphs[1:] == [True] * 6


def test_without_variables_to_train_there_is_one_pass():
    model = built(made())
    model.trainable = False
    vb.accumulate(model, microbatch_size=MICRO)
    with pytest.warns(UserWarning, match="trainable weights"):
        model.train_step((X, MASKS))
    assert len(model.layers[1].graphs[1:]) == len(CUT)


def test_a_plan_draws_nothing():
    model = built(made())
    before = torch.get_rng_state()
    vb.plan(model, (X, MASKS))
    assert torch.equal(torch.get_rng_state(), before)


class SomeMasked(layers.Layer):
    """Has a mask for micro-batches that begin with a positive number."""

    def call(self, x):
        return x

    def compute_mask(self, x, previous=None):
        known = isinstance(x, torch.Tensor) and x.device.type != "meta"
        return x[:, 0] > 0 if known and x[0, 0] > 0 else None


def test_a_mask_of_some_micro_batches_is_refused():
    model = made(lambda: keras.Sequential([SomeMasked(), layers.Dense(6)]), loss="mse")
    x = np.where(np.arange(20)[:, None] < 7, -1.0, np.ones((20, FEATURES)))
    vb.accumulate(model, microbatch_size=MICRO, gather=True)
    with pytest.raises(ValueError, match=r"a mask for every micro-batch or for none\. Got a mask"):
        model.train_step((x, MASKS))


def small():
    return keras.Sequential(
        [keras.Input((FEATURES,)), layers.Dense(64, activation="tanh"), layers.Dense(6)]
    )


def peak(count):
    """Bytes of activations for so many micro-batches."""
    model = made(small, loss=keras.losses.Dice())
    random = np.random.default_rng(0)
    x, y = random.normal(size=(SIZE * count, FEATURES)), random.random((SIZE * count, 6))
    vb.accumulate(model, microbatch_size=SIZE, gather=True)
    model.train_on_batch(x, y)
    gc.collect()
    saved = Saved()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, unpack):
            model.train_on_batch(x, y)
    finally:
        gc.enable()
    return saved.peak


def test_activations_are_those_of_one_micro_batch():
    few, many = peak(2), peak(16)
    assert 0 < many <= few


def test_half_precision_sums_in_float32():
    """Rounding to bfloat16 after each micro-batch, a sum would stay at 256."""

    def model():
        keras.config.set_dtype_policy("bfloat16")
        out = layers.Dense(1, use_bias=False, kernel_initializer="ones")
        return keras.Sequential([keras.Input((1,)), out])

    def total(y_true, y_pred):
        return keras.ops.sum(y_pred)

    found = made(model, loss=total)
    vb.accumulate(found, microbatch_size=1)
    seen = []
    found.optimizer.apply = lambda gradients, variables: seen.extend(gradients)
    x = np.ones((512, 1), "float32")
    found.train_on_batch(x, x)
    assert float(seen[0]) == 512.0
