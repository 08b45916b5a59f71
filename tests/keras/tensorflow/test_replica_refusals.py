"""What replicas cannot train exactly is refused before anything runs, with the way out."""

from contextlib import nullcontext

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tests.keras.problems import TARGETS, X
from tests.keras.tensorflow.replicas import SIZE, OwnLoss, regression, strategy

import virtualbatch.keras as vb

BATCH = X[:16], TARGETS[:16]
OUTSIDE = "Build and compile the same model outside of the scope"


def compiled_model(make=regression, loss="mse", **options):
    with strategy().scope():
        model = make()
        model.compile("sgd", loss, **options)
    return model


VERBS = {
    "plan": (lambda model: vb.plan(model, BATCH), f"plan measures one device.*{OUTSIDE}"),
    "certify": (lambda model: vb.certify(model, BATCH, **SIZE), f"certify compares.*{OUTSIDE}"),
    "auto": (lambda model: vb.accumulate(model, microbatch_size="auto"), f"auto.*{OUTSIDE}"),
}


@pytest.mark.parametrize(("act", "text"), VERBS.values(), ids=VERBS)
def test_what_is_done_on_one_device(act, text):
    model = compiled_model()
    with pytest.raises(ValueError, match=rf"{text}"):
        act(model)
    assert "train_step" not in vars(model)


def test_nothing_is_compiled():
    text = r"trained in a graph\. Got run_eagerly=True in a MirroredStrategy of 2 replicas"
    model = compiled_model(run_eagerly=True)
    with pytest.raises(ValueError, match=text):
        vb.accumulate(model, **SIZE)
    model.compile("sgd", "mse")
    vb.accumulate(model, **SIZE)
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=text):
        model.fit(*BATCH, batch_size=16, verbose=0)
    assert model.optimizer.iterations.numpy() == 0


def test_a_model_of_no_strategy():
    text = r"built and compiled in the scope.*Got a model of no strategy in the scope of a Mirrored"
    model = regression()
    model.compile("sgd", "mse")
    vb.accumulate(model, **SIZE)
    with strategy().scope():
        with pytest.raises(ValueError, match=text):
            model.fit(*BATCH, batch_size=16, verbose=0)
        with pytest.raises(ValueError, match=text):
            vb.accumulate(model, **SIZE)
    assert model.optimizer.iterations.numpy() == 0
    model.fit(*BATCH, batch_size=16, verbose=0)
    assert model.optimizer.iterations.numpy() == 1


def test_a_layer_that_waits_for_other_replicas():
    model = compiled_model(lambda: regression(layers.BatchNormalization(synchronized=True)))
    with pytest.raises(ValueError, match="must not wait for other replicas"):
        vb.accumulate(model, **SIZE)


def test_a_strategy_out_of_step(monkeypatch):
    class OutOfStep(tf.distribute.MirroredStrategy):
        pass

    monkeypatch.setattr(tf.distribute.experimental, "ParameterServerStrategy", OutOfStep)
    model = regression()
    model.compile("sgd", "mse")
    model._distribute_strategy = OutOfStep(["CPU:0"])
    with pytest.raises(ValueError, match=r"must train in step.*Use MirroredStrategy"):
        vb.accumulate(model, **SIZE)


class Counted(OwnLoss):
    """A loss that writes a metric."""

    def __init__(self):
        super().__init__()
        self.seen = keras.metrics.Mean()

    def compute_loss(self, *args, **options):
        found = super().compute_loss(*args, **options)
        self.seen.update_state(found)
        return found


def test_a_loss_that_writes():
    model = compiled_model(Counted)
    vb.accumulate(model, **SIZE, gather=False)
    with pytest.raises(ValueError, match=r"must not write variables.*in compute_metrics"):
        model.fit(*BATCH, batch_size=16, verbose=0)
    assert model.optimizer.iterations.numpy() == 0


class Centred(layers.Layer):
    """Couples rows."""

    def call(self, inputs):
        return inputs - keras.ops.mean(inputs, 0, keepdims=True)


@pytest.mark.proves_itself
@pytest.mark.parametrize(
    "inside",
    [pytest.param(False, marks=pytest.mark.thorough("the harder of the two is tried")), True],
    ids=["outside of the scope", "inside of it"],
)
def test_a_layer_that_couples_rows(inside):
    model = compiled_model(lambda: regression(Centred()))
    vb.accumulate(model, **SIZE)
    before = [variable.numpy() for variable in model.variables]
    scope = strategy().scope() if inside else nullcontext()
    with scope, pytest.raises(ValueError, match="coupled_rows at "):
        model.fit(*BATCH, batch_size=16, verbose=0)
    for variable, value in zip(model.variables, before, strict=True):
        for local in variable.value.values:
            np.testing.assert_array_equal(local.numpy(), value)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"microbatch_size": 6}, "microbatch_size=3 or less"),
        ({"accumulation_steps": 2}, "accumulation_steps=4 or more"),
    ],
    ids=str,
)
def test_memory_that_runs_out_is_not_tried_again(sizes, text, monkeypatch):
    calls = []

    def run_out(self, data):
        calls.append(data)
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    model = compiled_model()
    vb.accumulate(model, **sizes)
    monkeypatch.setattr(type(model.train_step), "with_losses", run_out)
    with pytest.raises(MemoryError, match=rf"cannot run their batch again.*{text}"):
        model.fit(*BATCH, batch_size=16, verbose=0)
    assert len(calls) <= 2


def test_rows_that_differ():
    model = compiled_model()
    vb.accumulate(model, **SIZE)
    with pytest.raises(ValueError, match="must have the same number of rows"):
        model.train_on_batch(X[:2], TARGETS[:1])
