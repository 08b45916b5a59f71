"""Certifying a Keras model leaves everything as it was, to the bit and to the object."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras.backends import BACKEND
from tests.keras.certified_models import TARGETS, Growing, X, dense, made, sequential

import virtualbatch.keras as vb

PLAIN = sequential(dense(4, "tanh"), dense(2))


@pytest.fixture(autouse=True)
def _float32(_float64):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def everything(model):
    """All that a user may see change: values, attributes of layers, generators, `.grad`s."""
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    values = {id(v): (v.dtype, np.array(ops.convert_to_numpy(v.value))) for v in variables}
    layered = [dict(vars(layer)) for layer in model._flatten_layers()]
    grads = [getattr(v.value, "grad", None) for v in variables] if BACKEND == "torch" else []
    others = [dict(vars(model.optimizer)), dict(vars(model._compile_loss)), np.random.get_state()]
    return values, layered, grads, others


def assert_same(before, after):
    assert list(before[0]) == list(after[0])
    for (dtype, a), (same, b) in zip(before[0].values(), after[0].values(), strict=True):
        assert dtype == same
        np.testing.assert_array_equal(a, b)
    for a, b in zip(before[1] + before[3][:2], after[1] + after[3][:2], strict=True):
        assert list(a) == list(b)
        # Scratch of Keras itself, which any call changes.
        scratch = ("_losses", "_loss_ids", "_losses_override")
        assert [name for name in a if a[name] is not b[name] and name not in scratch] == []
    assert [id(grad) for grad in before[2]] == [id(grad) for grad in after[2]]
    np.testing.assert_array_equal(before[3][2][1], after[3][2][1])


def busy(policy="float32"):
    """A model with everything that training changes."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, "tanh", dtype=policy),
            layers.BatchNormalization(dtype=policy),
            layers.Dropout(0.3, dtype=policy),
            Growing(dtype=policy),
            layers.Dense(2, dtype=policy),
        ]
    )


@pytest.mark.parametrize(
    ("accumulated", "policy"),
    [
        (True, "float32"),
        *(
            pytest.param(*given, marks=pytest.mark.thorough("another policy, or nothing to undo"))
            for given in [
                (False, "float32"),
                (True, "mixed_bfloat16"),
                (False, "bfloat16"),
            ]
        ),
    ],
)
def test_nothing_is_changed(accumulated, policy):
    def trained(certified):
        model = made(lambda: busy(policy), metrics=["mae"])
        if accumulated:
            vb.accumulate(model, microbatch_size=8)
        # What is not there yet is built, and would be missing before.
        model.train_on_batch(X, TARGETS)
        histories = []
        for _ in range(2):
            if certified:
                before, data = everything(model), (X.copy(), TARGETS.copy())
                assert not vb.certify(model, data, microbatch_size=8).exact
                assert_same(before, everything(model))
                np.testing.assert_array_equal(data[0], X)
                np.testing.assert_array_equal(data[1], TARGETS)
            histories.append(model.fit(X, TARGETS, epochs=2, verbose=0).history)
        return histories, everything(model)

    (plain, after), (same, again) = trained(False), trained(True)
    assert plain == same
    for (_, a), (_, b) in zip(after[0].values(), again[0].values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_that_is_not_built_trains_as_if_not_certified():
    histories = []
    for certified in (False, True):
        model = made(PLAIN)
        if certified:
            assert vb.certify(model, (X, TARGETS), microbatch_size=8).exact
        # Of a model that is not built, Keras on PyTorch shuffles the data once more.
        options = {"batch_size": 11, "shuffle": False, "verbose": 0}
        histories.append(model.fit(X, TARGETS, **options).history)
    assert histories[0] == histories[1]
