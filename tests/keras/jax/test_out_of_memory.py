"""On JAX a later window is given the only weights there are: what a failure leaves, and says."""

import time

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers
from tests.keras import problems
from tests.keras.problems import FEATURES, X, crossentropy
from tests.keras.running_out import out_of_memory

import virtualbatch.keras as vb

BATCH = X[:48], problems.LABELS[:48]
GONE = (
    r"^A window whose shape fitted once must fit again.* Got a later one for which 8 B more "
    r"were asked for, so \d+ B of weights, optimizer state and metrics are gone\. Load the last "
    r"checkpoint.* pass a smaller microbatch_size"
)


class Model(keras.Sequential):
    """Its windows can be made to run out of memory, before or after JAX takes the weights."""

    fails = None

    def make_train_function(self, force=False):
        super().make_train_function(force=force)
        run = self.train_function

        def train_function(state, iterator):
            fails, self.fails = self.fails, None
            if fails == "before":
                raise out_of_memory()
            result = run(state, iterator)
            if fails == "after":
                raise out_of_memory()
            return result

        self.train_function = train_function


def model():
    keras.utils.set_random_seed(1)
    found = Model([keras.Input((FEATURES,)), layers.Dense(3)])
    found.compile(keras.optimizers.SGD(0.1, momentum=0.9), crossentropy())
    found.optimizer.build(found.trainable_variables)
    return vb.accumulate(found, microbatch_size=16)


def state_of(found):
    kinds = ("trainable", "non_trainable", "optimizer", "metrics")
    return found._get_jax_state(**{f"{kind}_variables": True for kind in kinds})


def values(found):
    return [np.asarray(v) for v in (*found.variables, *found.optimizer.variables)]


def test_weights_that_were_taken_are_said_to_be_gone():
    found = model()
    found.train_on_batch(*BATCH)
    found.fails = "after"
    with pytest.raises(MemoryError, match=GONE) as raised:
        found.train_on_batch(*BATCH)
    assert isinstance(raised.value.__cause__, jax.errors.JaxRuntimeError)


def test_a_later_window_runs_again_while_its_weights_are_there():
    found, due = model(), model()
    for each in (found, due):
        each.train_on_batch(*BATCH)
    found.fails = "before"
    found.train_on_batch(*BATCH)
    due.train_on_batch(*BATCH)
    for mine, theirs in zip(values(found), values(due), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def failed():
    """An array that a program should have given, but ran out of memory, which JAX tells late."""

    def run(x):
        rows = jnp.arange(2**23, dtype="float32")
        return x + jnp.sort(rows[:, None] * rows * x[0], axis=0).sum()

    found = jax.jit(run)(jnp.ones(3))
    while not found.is_ready():
        time.sleep(0.001)
    return found


@pytest.mark.parametrize("rows", [48, 32], ids=["a shape that has fitted", "another shape"])
def test_an_error_that_comes_late_is_said_by_the_next_window(rows):
    found = model()
    found.train_on_batch(*BATCH)
    (_, *trainable), *others = state_of(found)
    state = ([failed(), *trainable], *others)
    with pytest.raises(
        MemoryError, match=r"Got a later one for which .*iB more were asked for, so"
    ):
        found.train_function(state, iter([(X[:rows], problems.LABELS[:rows])]))


def test_other_errors_of_a_later_window_come_out_as_they_are(monkeypatch):
    found = model()
    found.train_on_batch(*BATCH)
    before = values(found)
    monkeypatch.setattr(f"{__name__}.out_of_memory", lambda: RuntimeError("a broken cable"))
    found.fails = "before"
    with pytest.raises(RuntimeError, match="a broken cable"):
        found.train_on_batch(*BATCH)
    for mine, theirs in zip(values(found), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)
