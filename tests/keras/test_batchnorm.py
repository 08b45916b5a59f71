"""BatchNorm: gradients of unsynchronised replicas, moments merged exactly, one momentum update.

The reference is written out here: a loop over micro-batches for the gradients, and the moments of
everything that a layer saw, taken together, for its moving averages.
"""

import keras
import numpy as np
import pytest
from keras import layers
from tests.keras import problems
from tests.keras.backends import BACKEND, supported
from tests.keras.problems import FEATURES, X, compiled, crossentropy
from tests.keras.training import (
    BATCH,
    MICRO,
    ROWS,
    Case,
    assert_equals_keras,
    assert_same_variables,
    eagerly,
    in_tiers,
    sizes_of,
    train,
)
from tests.oracle import assert_all_close, assert_close

import virtualbatch.keras as vb
from virtualbatch.keras._batchnorm import recorded_moments

LABELS, SERIES = problems.LABELS, problems.SERIES


def still(**options):
    """An optimizer that moves nothing, so that the statistics of both runs see the same weights."""
    return compiled(optimizer=lambda: keras.optimizers.SGD(0.0), metrics=None, **options)


def first(shape=(FEATURES,), **options):
    def model():
        norm = layers.BatchNormalization(momentum=0.7, **options)
        return keras.Sequential([keras.Input(shape), norm, layers.Flatten(), layers.Dense(3)])

    return model


def shared():
    """One layer called on two inputs: two momentum updates, in the order of the calls."""
    norm = layers.BatchNormalization(momentum=0.7)
    inputs = keras.Input((FEATURES,))
    return keras.Model(inputs, layers.Dense(3)(norm(inputs) + norm(3 * inputs + 1)))


def nested():
    block = keras.Sequential([keras.Input((FEATURES,)), layers.BatchNormalization()])
    inputs = keras.Input((FEATURES,))
    return keras.Model(inputs, layers.Dense(3)(block(inputs)))


class Late(layers.Layer):
    """Makes its BatchNorm when it is built, so that no model knows of it before."""

    def build(self, shape):
        self.norm = layers.BatchNormalization()
        self.norm.build(shape)

    def call(self, inputs, training=False):
        return self.norm(inputs, training=training)


class Lazy(keras.Model):
    """A subclassed model that is built by its first batch."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = Late(), layers.Dense(3)

    def call(self, inputs, training=False):
        return self.out(self.norm(inputs, training=training))


def masked():
    norm = layers.BatchNormalization(momentum=0.7)
    shape = SERIES.shape[1:]
    return keras.Sequential([keras.Input(shape), layers.Masking(), norm, layers.Dense(3)])


REASON = "other shapes, models and modes of one BatchNorm"

FIRST = supported([
    Case("rows, a short last batch", first(), still(), X, LABELS, rows=ROWS),
    Case("eager", first(), still(run_eagerly=True), X, LABELS),
    Case("shared", shared, still(), X, LABELS),
    Case("built late", Lazy, still(), X, LABELS),
])  # fmt: skip

FURTHER = supported([
    Case("images", first((6, 6, 2)), still(), problems.IMAGES, LABELS),
    Case("another axis", first((6, 6, 2), axis=1), still(), problems.IMAGES, LABELS),
    Case("jit", first(), still(jit_compile=True), X, LABELS, needs=("jit_compile",)),
    Case("steps_per_execution", first(), still(steps_per_execution=2), X, LABELS,
         needs=("steps_per_execution",)),
    Case("nested", nested, still(), X, LABELS),
    Case("built late, eager", Lazy, still(run_eagerly=True), X, LABELS),
    Case("without scale and centre", first(scale=False, center=False), still(), X, LABELS),
])  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(FIRST, FURTHER, REASON))
def test_the_statistics_of_the_first_batchnorm_are_those_of_the_whole_batch(case):
    expected, actual = train(eagerly(case), accumulated=False), train(case, accumulated=True)
    assert_same_variables(actual.model.variables, expected.model.variables, 1e-12)


@pytest.mark.parametrize(
    "eager", [False, pytest.param(True, marks=pytest.mark.thorough("the same, run eagerly"))]
)
def test_masked_statistics_are_those_of_the_whole_batch(eager):
    # Keras divides masked sums by their number plus 1e-7, in each micro-batch once.
    case = Case("", masked, still(run_eagerly=eager), SERIES, problems.TOKEN_LABELS)
    expected, actual = train(eagerly(case), accumulated=False), train(case, accumulated=True)
    assert_same_variables(actual.model.variables, expected.model.variables, 1e-7)


def test_frozen_batchnorm_equals_keras(caplog):
    assert_equals_keras(Case("", first(trainable=False), compiled(), X, LABELS))
    assert not [record for record in caplog.records if record.name == "virtualbatch"]


def two_norms(momentum=0.7):
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.BatchNormalization(momentum=momentum),
            layers.Dense(4, activation="tanh"),
            layers.BatchNormalization(momentum=momentum),
            layers.Dense(3),
        ]
    )


def replicas(x, y, sizes):
    """One update by hand, from gradients that plain Keras computes for each micro-batch alone.

    Returns:
        How far the trainable variables move, and moving averages of the two BatchNorm layers.
    """
    # JAX would compile each operation for each number of rows.
    model = started(run_eagerly=BACKEND != "jax")
    start = model.get_weights()
    norms = [model.layers[0], model.layers[2]]
    moving = [[weight.copy() for weight in norm.get_weights()[2:]] for norm in norms]
    seen = [[], []]
    moved = [np.zeros(v.shape) for v in model.trainable_variables]
    for rows in np.split(np.arange(len(x)), np.cumsum(sizes)[:-1]):
        value = keras.ops.convert_to_tensor(x[rows])
        for index, layer in enumerate(model.layers):
            if index in (0, 2):
                seen[index // 2].append(keras.ops.convert_to_numpy(value))
            value = layer(value, training=True)
        model.set_weights(start)
        before = [v.numpy() for v in model.trainable_variables]
        model.train_on_batch(x[rows], y[rows])
        share = len(rows) / len(x)
        moved = [
            total + share * (old - v.numpy())
            for total, old, v in zip(moved, before, model.trainable_variables, strict=True)
        ]
        model.set_weights(start)
    averages = [
        part * 0.7 + 0.3 * moment(np.concatenate(values), axis=0)
        for (mean, variance), values in zip(moving, seen, strict=True)
        for part, moment in ((mean, np.mean), (variance, np.var))
    ]
    return moved, averages


def started(**options):
    keras.utils.set_random_seed(1)
    model = two_norms()
    model.compile(keras.optimizers.SGD(1.0), crossentropy(), **options)
    return model


@pytest.mark.parametrize(
    "rows",
    [
        slice(0, 50),
        pytest.param(slice(100, 130), marks=pytest.mark.thorough("another number of rows")),
        slice(100, 101),
    ],
)
def test_gradients_are_those_of_replicas(rows):
    x, y = X[rows], LABELS[rows]
    due, averages = replicas(x, y, sizes_of(len(x)))
    model = started()
    before = [v.numpy() for v in model.trainable_variables]
    vb.accumulate(model, microbatch_size=MICRO)
    model.fit(x, y, batch_size=BATCH, verbose=0, shuffle=False)

    for old, variable, moved in zip(before, model.trainable_variables, due, strict=True):
        # A bias before a BatchNorm has no gradient but the rounding.
        assert_close(old - variable.numpy() + 1.0, moved + 1.0, 1e-12)
    assert_all_close([v.numpy() for v in model.non_trainable_variables], averages, 1e-12)


def test_batchnorm_is_named(caplog):
    train(Case("", two_norms, still(), X, LABELS), accumulated=True)
    said = [record.getMessage() for record in caplog.records if record.name == "virtualbatch"]
    assert len(said) == 1
    assert "normalises each micro-batch by its own statistics" in said[0]


def test_renorm_is_named(caplog):
    train(Case("", first(renorm=True, name="again"), still(), X, LABELS), accumulated=True)
    said = [record.getMessage() for record in caplog.records if record.name == "virtualbatch"]
    assert len(said) == 1
    assert "(again) change with each forward" in said[0]


@pytest.mark.thorough("inference does not accumulate")
def test_inference_is_as_ever():
    case = eagerly(Case("", first(), still(), X, LABELS))
    expected, actual = train(case, accumulated=False), train(case, accumulated=True)
    assert_close(actual.model.predict(X, verbose=0), expected.model.predict(X, verbose=0), 1e-12)


def test_a_layer_is_in_one_window_at_a_time():
    one, two = layers.BatchNormalization(), layers.BatchNormalization(name="shared")
    before = set(vars(one)), set(vars(two))
    with (
        recorded_moments([two]) as seen,
        pytest.raises(RuntimeError, match=r"one window at a time\. Got 'shared' inside a window"),
        recorded_moments([one, two]),
    ):
        pass
    assert not seen
    assert (set(vars(one)), set(vars(two))) == before
