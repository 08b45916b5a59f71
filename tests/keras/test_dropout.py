"""Dropout draws fresh masks for every micro-batch; with the same masks it is exact."""

import keras
import numpy as np
import pytest
from keras import layers
from tests.keras import problems
from tests.keras.backends import modes
from tests.keras.problems import FEATURES, X, compiled
from tests.keras.training import Case, assert_equals_keras, train

import virtualbatch.keras as vb

LABELS = problems.LABELS


@pytest.mark.thorough("the masks of the other tests, drawn once more")
def test_rate_zero_equals_keras():
    def model():
        return keras.Sequential([keras.Input((FEATURES,)), layers.Dropout(0.0), layers.Dense(3)])

    assert_equals_keras(Case("", model, compiled(), X, LABELS))


def test_the_same_masks_give_the_same_update():
    # A layer that drops what an input of its own names, so that both runs drop the same.
    def model():
        inputs, kept = keras.Input((FEATURES,)), keras.Input((4,))
        hidden = layers.Dense(4, activation="tanh")(inputs)
        return keras.Model([inputs, kept], layers.Dense(3)(hidden * kept * 2.0))

    kept = np.random.default_rng(1).integers(0, 2, size=(len(X), 4)).astype("float64")
    assert_equals_keras(Case("", model, compiled(), [X, kept], LABELS))


def gradients_of_kept_features(mode, features=64):
    """Gradient of w in mean(dropout(1) @ w) for batches of two rows, one row a micro-batch.

    A feature has gradient 2, 1 or 0: kept (and doubled) in both rows, in one, or in none.
    """
    keras.utils.set_random_seed(0)
    outputs = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((features,)), layers.Dropout(0.5), outputs])
    model.compile(keras.optimizers.SGD(1.0), lambda y_true, y_pred: y_pred[:, 0], **mode)
    vb.accumulate(model, microbatch_size=1)
    found = []
    for _ in range(3):
        before = outputs.kernel.numpy()[:, 0]
        model.train_on_batch(np.ones((2, features)), np.zeros(2))
        found.append(before - outputs.kernel.numpy()[:, 0])
    return found


@pytest.mark.parametrize("mode", modes(), ids=str)
def test_masks_are_fresh(mode):
    first, second, third = gradients_of_kept_features(mode)
    # Were the masks of both micro-batches one, only 0 and 2 would be seen.
    assert set(np.round(first, 12)) == {0.0, 1.0, 2.0}
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


@pytest.mark.thorough("the masks of the other tests, drawn once more")
def test_masks_follow_the_seed():
    first, again = gradients_of_kept_features({}), gradients_of_kept_features({})
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    "eager", [False, pytest.param(True, marks=pytest.mark.thorough("the same, run eagerly"))]
)
def test_counting_masked_tokens_draws_no_seeds(eager):
    # The forward that only counts leaves seeds, statistics and metrics as they were.
    def model(mask):
        return lambda: keras.Sequential(
            [
                keras.Input((problems.TOKENS,), dtype="int32"),
                layers.Embedding(problems.WORDS, 4, mask_zero=mask),
                layers.Dropout(0.5),
                layers.BatchNormalization(),
                layers.Dense(3),
            ]
        )

    seeds = []
    for mask in (True, False):
        data = (problems.WORD_IDS, problems.TOKEN_LABELS, {"epochs": 1})
        case = Case("", model(mask), compiled(run_eagerly=eager), *data)
        trained = train(case, accumulated=True).model
        seeds.append([v.numpy() for v in trained.variables if "seed_generator" in v.path])
    assert len(seeds[0]) == 1
    np.testing.assert_array_equal(seeds[0], seeds[1])
