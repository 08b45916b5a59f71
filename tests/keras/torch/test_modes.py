"""How PyTorch runs a window: eagerly, each micro-batch once, and an uncut batch as Keras does."""

import keras
import numpy as np
import pytest
import torch
from keras import layers
from tests.keras import problems
from tests.keras.problems import FEATURES, X, compiled
from tests.keras.training import Case, assert_same_run, train

import virtualbatch.keras as vb

LABELS = problems.LABELS


class Counting(layers.Layer):
    """Notes the rows of each forward that computes something, and whether it has a gradient."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.calls = []

    def call(self, inputs):
        if inputs.device.type != "meta":
            self.calls.append((inputs.shape[0], torch.is_grad_enabled()))
        return inputs


def counting(*before, shape):
    counter = Counting()
    model = keras.Sequential([keras.Input(shape), *before, counter, layers.Dense(3)])
    model.compile(**compiled()())
    vb.accumulate(model, microbatch_size=16)
    return model, counter.calls


def test_each_micro_batch_has_one_forward():
    model, calls = counting(shape=(FEATURES,))
    model.test_on_batch(X, LABELS)
    calls.clear()
    model.fit(X, LABELS, batch_size=50, epochs=2, verbose=0)
    # As equal as can be: no lonely row meets a BatchNorm.
    once = [(rows, True) for rows in [13, 13, 12, 12, 13, 13, 12, 12, 15, 15]]
    assert calls == once * 2


def test_masks_are_counted_by_one_forward_more_without_a_gradient():
    x, y = problems.SERIES[:50], problems.TOKEN_LABELS[:50]
    model, calls = counting(layers.Masking(), shape=x.shape[1:])
    model.test_on_batch(x, y)
    calls.clear()
    model.fit(x, y, batch_size=50, verbose=0)
    assert sorted(calls) == sorted((rows, on) for rows in [13, 13, 12, 12] for on in (False, True))


def test_an_uncut_batch_is_the_ordinary_computation_to_the_bit():
    case = Case("", problems.tagger, compiled(optimizer="adam"), problems.WORD_IDS,
                problems.TOKEN_LABELS, sizes={"microbatch_size": 50})  # fmt: skip
    expected, actual = train(case, accumulated=False), train(case, accumulated=True)
    assert_same_run(actual, expected, rtol=0.0)


def test_steps_per_execution_is_refused_as_keras_refuses_it():
    texts = []
    for accumulated in (False, True):
        case = Case("", problems.classifier, compiled(steps_per_execution=2), X, LABELS)
        with pytest.raises(ValueError, match="`steps_per_execution` must be 1") as refusal:
            train(case, accumulated)
        texts.append(str(refusal.value))
    assert texts[0] == texts[1]


def test_jit_compile_leaves_the_window_to_python(monkeypatch):
    plain = Case("", problems.classifier, compiled(), X, LABELS)
    expected = train(plain, accumulated=False)
    compilations = []
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compilations.append(args))
    case = plain._replace(compile=compiled(jit_compile=True))
    actual = train(case, accumulated=True)
    assert_same_run(actual, expected)
    assert compilations == []
    # Only the train function is meant: what the user asked for still holds for the others.
    assert actual.model.jit_compile is True


def test_gradients_are_left_where_keras_leaves_them():
    found = []
    for accumulated in (False, True):
        case = Case("", problems.classifier, compiled(), X, LABELS)
        model = train(case, accumulated).model
        found.append([v.value.grad.numpy() for v in model.trainable_variables])
    for due, actual in zip(*found, strict=True):
        np.testing.assert_allclose(actual, due, rtol=1e-10, atol=1e-15)


class Branching(keras.Model):
    """Uses its weights only for batches in which a value is large."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(1, use_bias=False)

    def call(self, inputs):
        found = self.out(inputs)
        return found if float(inputs.max()) > 1 else inputs.detach()


def test_a_micro_batch_may_not_reach_the_weights():
    model = Branching()
    model.compile(keras.optimizers.SGD(1.0), lambda y_true, y_pred: y_pred[..., 0])
    x = np.array([[0.5], [2.0], [0.5], [4.0]])
    model(x)
    before = float(model.out.kernel.value.detach())
    vb.accumulate(model, microbatch_size=1)
    model.fit(x, np.zeros(4), batch_size=4, verbose=0, shuffle=False)
    assert before - float(model.out.kernel.value.detach()) == pytest.approx((2.0 + 4.0) / 4)


def test_a_loss_without_any_gradient_is_refused_as_pytorch_refuses_it():
    model = Branching()
    model.compile("sgd", "mse")
    vb.accumulate(model, microbatch_size=1)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.fit(np.full((4, 1), 0.5), np.zeros(4), batch_size=4, verbose=0)
