"""Modules of PyTorch inside a Keras model obey the same law."""

import keras
import numpy as np
import torch
from keras import layers
from tests.keras import problems
from tests.keras.problems import FEATURES, X, compiled
from tests.keras.training import Case, assert_equals_keras, assert_same_variables, train
from tests.oracle import assert_close

import virtualbatch.keras as vb

LABELS = problems.LABELS


def wrapped(*modules):
    return layers.TorchModuleWrapper(torch.nn.Sequential(*modules).double())


def test_a_module_equals_keras():
    def model():
        hidden = wrapped(torch.nn.Linear(FEATURES, 4), torch.nn.Tanh())
        return keras.Sequential([keras.Input((FEATURES,)), hidden, layers.Dense(3)])

    assert_equals_keras(Case("", model, compiled(optimizer="adam"), X, LABELS))


class TwoShifts(torch.nn.Module):
    """Two parameters whose gradients PyTorch puts in the same memory."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.zeros(FEATURES).double()) for _ in range(2))

    def forward(self, x):
        return x + (self.a[None] + self.b[None])


def test_gradients_in_the_same_memory_are_not_added_twice():
    def model():
        return keras.Sequential([keras.Input((FEATURES,)), wrapped(TwoShifts()), layers.Dense(3)])

    assert_equals_keras(Case("", model, compiled(), X, LABELS))


def buffers(model):
    """Values of the buffers of the wrapped modules."""
    wrappers = [layer for layer in model.layers if isinstance(layer, layers.TorchModuleWrapper)]
    found = [buffer.numpy() for layer in wrappers for buffer in layer.module.buffers()]
    assert found
    return found


def normalised():
    norm = wrapped(torch.nn.BatchNorm1d(FEATURES, momentum=0.3))
    return keras.Sequential([keras.Input((FEATURES,)), norm, layers.Dense(3)])


def test_statistics_of_the_first_batchnorm_are_those_of_the_whole_batch():
    case = Case("", normalised, compiled(optimizer=lambda: keras.optimizers.SGD(0.0)), X, LABELS)
    expected, actual = train(case, accumulated=False), train(case, accumulated=True)
    assert_same_variables(actual.model.variables, expected.model.variables, 1e-12)
    for found, due in zip(buffers(actual.model), buffers(expected.model), strict=True):
        assert_close(found, due)


def test_statistics_are_merged_after_an_evaluation_too():
    # Keras leaves modules in eval mode, from which the next call takes them.
    found = []
    for accumulates in (False, True):
        model = normalised()
        model.compile(keras.optimizers.SGD(0.0), "mse")
        model.evaluate(X, X[:, :3], verbose=0)
        if accumulates:
            vb.accumulate(model, microbatch_size=16)
        model.train_on_batch(X, X[:, :3])
        found.append(buffers(model))
    for actual, due in zip(found[1], found[0], strict=True):
        assert_close(actual, due)


def test_counting_masks_draws_nothing_and_changes_no_buffer():
    def trained(mask):
        random = wrapped(torch.nn.Dropout(0.5), Calls())
        random.supports_masking = True
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((problems.TOKENS,), dtype="int32"),
                layers.Embedding(problems.WORDS, 4, mask_zero=mask),
                random,
                layers.Dense(3),
            ]
        )
        model.compile(**compiled()())
        vb.accumulate(model, microbatch_size=16)
        model.fit(problems.WORD_IDS, problems.TOKEN_LABELS, batch_size=50, verbose=0, shuffle=False)
        return buffers(model), torch.get_rng_state()

    (masked, state), (unmasked, due) = trained(True), trained(False)
    np.testing.assert_array_equal(masked, unmasked)
    assert torch.equal(state, due)


class Calls(torch.nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x
