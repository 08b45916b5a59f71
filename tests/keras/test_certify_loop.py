"""certify_loop on loops that train Keras models, among them Keras' own accumulation."""

import keras
import numpy as np
import pytest

import virtualbatch.keras as vb

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 12, 5)), RNG.normal(size=(2, 12, 2))
BATCHES = list(zip(X, Y, strict=True))


def training(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2, "tanh")])
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    return model, {"model": model.weights, "optimizer": optimizer}


def by_accumulate(model):
    def loop(microbatches, accumulation_steps):
        for first in range(0, len(microbatches), accumulation_steps):
            window = microbatches[first : first + accumulation_steps]
            x, y = (np.concatenate(parts) for parts in zip(*window, strict=True))
            model.train_on_batch(x, y)

    return loop


def built_in(model):
    """With the option of Keras' optimizers."""

    def loop(microbatches, accumulation_steps):
        steps = accumulation_steps if accumulation_steps > 1 else None
        model.optimizer.gradient_accumulation_steps = steps
        model.optimizer._iterations.assign(0)
        model.make_train_function(force=True)
        for x, y in microbatches:
            model.train_on_batch(x, y)

    return loop


def without_iterations(state):
    """The option counts micro-batches there, and knows it."""
    variables = [v for v in state["optimizer"].variables if "iteration" not in v.path]
    return state | {"optimizer": variables}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(keras.optimizers.SGD, marks=pytest.mark.thorough("Adam has more state")),
        keras.optimizers.Adam,
    ],
)
def test_no_false_alarm(make):
    model, state = training(make(0.1))
    vb.accumulate(model, microbatch_size=5)
    before = [np.array(v) for v in model.weights]
    found = vb.certify_loop(by_accumulate(model), BATCHES, microbatch_size=3, **state)
    assert found.findings == (), found
    assert found.exact
    assert any("kernel" in name for name in found.parameters)
    for found_value, due in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(np.array(found_value), due)
    assert int(model.optimizer.iterations) == 0


def test_the_option_of_keras_drops_the_last_window():
    model, state = training(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))
    found = vb.certify_loop(
        built_in(model), BATCHES, microbatch_size=3, **without_iterations(state)
    )
    assert [finding.kind for finding in found.findings] == ["last_window"]
    assert "dropped" in found.findings[0].why


def test_the_option_of_keras_is_a_mean_of_means():
    model, state = training(keras.optimizers.SGD(0.1, gradient_accumulation_steps=3))
    found = vb.certify_loop(
        built_in(model), BATCHES, microbatch_size=5, **without_iterations(state)
    )
    assert [finding.kind for finding in found.findings] == ["weight"]


def test_a_step_at_each_microbatch():
    model, state = training(keras.optimizers.Adam(0.1))

    def loop(microbatches, accumulation_steps):
        for x, y in microbatches:
            model.train_on_batch(x, y)

    found = vb.certify_loop(loop, BATCHES, microbatch_size=3, **state)
    (finding,) = found.findings
    assert finding.kind == "per_microbatch"
    assert "iteration" in finding.where


def test_state_that_the_first_update_makes_is_refused():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    model.compile("adam", loss="mse")
    with pytest.raises(
        ValueError, match=r"All state must exist before certify_loop.*\n?.*Build it"
    ):
        vb.certify_loop(
            by_accumulate(model),
            BATCHES,
            microbatch_size=3,
            weights=model.weights,
            optimizer=model.optimizer,
        )


def test_state_without_variables_is_refused():
    with pytest.raises(TypeError, match="Got model=int"):
        vb.certify_loop(lambda pieces, steps: None, BATCHES, microbatch_size=3, model=3)
