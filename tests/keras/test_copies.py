"""Copies of a model that accumulates: a deep copy does too, the others are plain and say so."""

import copy
import logging
import pickle

import keras
import pytest
from keras import layers
from tests.keras import problems
from tests.keras.problems import X, compiled
from tests.oracle import assert_all_close

import virtualbatch.keras as vb

LABELS = problems.LABELS


class Rows(layers.Layer):
    """Notes how many rows it is called with."""

    def build(self, shape):
        self.seen = set()

    def call(self, inputs):
        self.seen.add(inputs.shape[0])
        return inputs


def model(*first):
    keras.utils.set_random_seed(1)
    found = keras.Sequential([keras.Input((problems.FEATURES,)), *first, layers.Dense(3)])
    found.compile(**compiled(optimizer="sgd")())
    return found


def test_a_deep_copy_accumulates():
    found = vb.accumulate(model(Rows()), microbatch_size=16, check=False)
    # Keras loads a copy by the names of its classes.
    with keras.saving.custom_object_scope({"Rows": Rows}):
        (twin,) = copy.deepcopy([found])
    assert twin.train_step is not found.train_step
    assert (twin.train_step.microbatch_size, twin.train_step.check) == (16, False)
    for each in (twin, found):
        each.train_on_batch(X[:32], LABELS[:32])
    assert 16 in twin.layers[0].seen
    assert_all_close(twin.get_weights(), found.get_weights(), 1e-12)


def test_copies_of_copies_are_taken_back_by_themselves():
    found = vb.accumulate(model(), microbatch_size=16)
    twin = copy.deepcopy(found)
    again = copy.deepcopy(twin)
    vb.restore(twin)
    assert "train_step" not in vars(copy.deepcopy(twin))
    assert again.train_step.microbatch_size == found.train_step.microbatch_size == 16


def test_a_deep_copy_asks_for_all_that_was_asked_for():
    def lengths(x):
        return (x != 0).sum(1)

    auto = vb.accumulate(model(), microbatch_size="auto", gather=False)
    assert copy.deepcopy(auto).train_step.microbatch_size == "auto"
    assert copy.deepcopy(auto).train_step.gather is False
    vb.accumulate(auto, microbatch_tokens=64, lengths=lengths)
    assert copy.deepcopy(auto).train_step.packing == auto.train_step.packing
    vb.accumulate(auto, accumulation_steps=3)
    assert copy.deepcopy(auto).train_step.rows_asked_for(48) == 16


class OwnCompile(keras.Sequential):
    """Keras does not call its compile where it copies it."""

    def compile(self, **kwargs):
        super().compile(**kwargs)


def test_a_copy_that_is_not_compiled_says_so(caplog):
    with keras.saving.custom_object_scope({"OwnCompile": OwnCompile}):
        found = OwnCompile([keras.Input((2,)), layers.Dense(1)], name="mine")
        found.compile(loss="mse")
        vb.accumulate(found, microbatch_size=16)
        with pytest.warns(UserWarning, match="was not called as part of model loading"):
            twin = copy.deepcopy(found)
    assert "train_step" not in vars(twin)
    assert "The copy of the model 'mine' is not compiled, so it does not accumulate" in caplog.text


@pytest.mark.parametrize(
    "duplicate",
    [lambda found: pickle.loads(pickle.dumps(found)), copy.copy],
    ids=["pickle", "copy"],
)
def test_a_pickle_is_plain_and_says_so_once(duplicate, caplog):
    found = vb.accumulate(model(), microbatch_size=16)
    with caplog.at_level(logging.WARNING, "virtualbatch"):
        twin, _ = duplicate(found), duplicate(found)
    assert not {"train_step", "__deepcopy__", "__reduce__"} & vars(twin).keys()
    assert caplog.text.count("Call accumulate on it again.") == 1
    caplog.clear()
    # What is copied deeply accumulates, and a plain model has nothing to say.
    copy.deepcopy(found)
    duplicate(twin)
    duplicate(vb.restore(found))
    assert not caplog.records


def test_a_pickle_is_read_without_virtualbatch():
    found = vb.accumulate(model(), microbatch_size=16)
    assert b"virtualbatch" not in pickle.dumps(found)


def test_accumulate_and_restore_return_the_model():
    found = model()
    assert vb.accumulate(found, microbatch_size=16) is found
    assert vb.restore(found) is found
    assert vb.restore(found) is found
