"""Losses that see all rows, on two replicas: `fit` trains as one device does on the whole batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tests.keras.coupled import (
    CASES,
    HEADS,
    MASKS,
    TAGS_AND_MASKS,
    TEMPERATURE,
    VALUES,
    Temperature,
    X,
    coupled,
    mlp,
)
from tests.keras.tensorflow.replicas import on_replicas, strategy
from tests.keras.tensorflow.test_replicas import collectives
from tests.keras.training import (
    RTOL,
    assert_same_run,
    assert_same_values,
    eagerly,
    in_tiers,
    train,
)
from tests.oracle import assert_close

import virtualbatch.keras as vb
from virtualbatch.keras._tensorflow.rows_of_replicas import RowsOfReplicas

SLOW = "each traces a model twice for each of two replicas"


class Listening(Temperature):
    """A loss with a variable of its own, and a BatchNormalization that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.normalise = layers.BatchNormalization(momentum=0.5, center=False, scale=False)

    def call(self, x, training=False):
        self.normalise(x, training=training)
        return super().call(x)


class Rows(keras.metrics.Metric):
    """Rows that were shown to it, which is no mean."""

    def __init__(self):
        super().__init__(name="rows")
        self.seen = self.add_variable((), "zeros", name="seen")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen.assign_add(keras.ops.cast(keras.ops.shape(y_pred)[0], self.dtype))

    def result(self):
        return keras.ops.copy(self.seen)


class OwnMetrics(keras.Model):
    """Metrics of its own, of which one is no mean."""

    def __init__(self):
        super().__init__()
        self.out = mlp(6, "sigmoid")()
        self.hits = keras.metrics.TruePositives()

    def call(self, x):
        return self.out(x)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.hits.update_state(y, y_pred)
        return super().compute_metrics(x, y, y_pred, sample_weight)


def beside_others(y_true, y_pred):
    """A value per row, which needs no other row, but reads them."""
    off = y_pred - 0.5 * keras.ops.mean(y_pred, 0, keepdims=True)
    return keras.ops.mean(keras.ops.square(off - y_true), 1)


def once(case):
    """A batch that both replicas have rows of, and one that leaves the second without any."""
    fit = case.fit | {"epochs": 1}
    return case._replace(name=f"{case.name}, two batches", fit=fit, rows=21)


COUNTED = coupled(
    "masked words beside Dice",
    TAGS_AND_MASKS.model,
    lambda: TAGS_AND_MASKS.compile()["loss"],
    TAGS_AND_MASKS.x,
    TAGS_AND_MASKS.y,
    fit=TAGS_AND_MASKS.fit,
    metrics=lambda: [["accuracy"], [keras.metrics.TruePositives()]],
)
OWN = coupled(
    "moments and a variable in compute_loss",
    Listening,
    lambda: None,
    X,
    VALUES,
    metrics=lambda: [Rows()],
)
DICE = mlp(6, "sigmoid"), keras.losses.Dice, X, MASKS
FURTHER = [
    TAGS_AND_MASKS,
    TEMPERATURE,
    *CASES,
    once(COUNTED),
    coupled("gather=True", mlp(6), lambda: "mse", X, MASKS, sizes={"gather": True}),
    coupled("compute_metrics", OwnMetrics, keras.losses.Dice, X, MASKS),
    coupled("compiled", *DICE, jit_compile=lambda: True),
    coupled("micro-batches", *DICE, sizes={"microbatch_size": None, "accumulation_steps": 3}),
    coupled("one micro-batch", *DICE, sizes={"microbatch_size": 50}),
    coupled(
        "a scaled loss, clipped",
        *DICE,
        optimizer=lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1, global_clipnorm=0.01)
        ),
    ),
]


@pytest.mark.parametrize("case", in_tiers([once(OWN)], FURTHER, SLOW))
def test_equals_one_device(case):
    several = case.model in (HEADS.model, TAGS_AND_MASKS.model)
    # A graph weighs the losses of several outputs by the batch, not by its rows.
    expected = train(case if several else eagerly(case), accumulated=False)
    assert_same_run(on_replicas(case), expected)


@pytest.mark.thorough(SLOW)
@pytest.mark.proves_itself
def test_what_larger_batches_show_is_found_before_they_are_trained(caplog):
    # One row tells by its shape only: that this loss gives a value per row.
    given = coupled("", mlp(16), lambda: beside_others, X, VALUES)
    plain = given.model()
    plain.compile(**given.compile() | {"run_eagerly": True})
    with strategy().scope():
        model = given.model()
        model.compile(**given.compile())
    model.set_weights(plain.get_weights())
    vb.accumulate(model, **given.sizes)
    for rows in (1, 20):
        logs = [m.train_on_batch(X[:rows], VALUES[:rows], return_dict=True) for m in (model, plain)]
        assert_same_values(*logs)
        assert ("it gets the predictions of all rows" in caplog.text) == (rows > 1)
    for mine, due in zip(model.variables, plain.variables, strict=True):
        assert_close(mine.numpy(), due.numpy(), RTOL)


@pytest.mark.thorough(SLOW)
@pytest.mark.parametrize("size", [10, 4, 1])
def test_as_many_reductions_for_any_number_of_microbatches(size):
    devices = strategy()
    with devices.scope():
        model = mlp(6, "sigmoid")()
        model.compile("sgd", keras.losses.Dice())
        model._symbolic_build(data_batch=(X[:2], MASKS[:2]))
    rows = tf.data.Dataset.from_tensor_slices((X[:20], MASKS[:20])).batch(20)
    data = next(iter(devices.experimental_distribute_dataset(rows)))
    # Rows of each replica, shapes, rows, gradients; the loss itself is known to all.
    assert collectives(model, data, size) == ({"CollectiveReduceV2": 2 * 4}, 0)


def gathered(local, rows):
    """What each of two replicas gets to see of arrays.

    Args:
        local: number of a replica -> its arrays.
        rows: of each replica.
    """
    specs = [tf.TensorSpec([None] * np.ndim(x), np.asarray(x).dtype) for x in local(0)]

    def see(*arrays):
        return RowsOfReplicas(tf.constant(rows)).of_all(arrays)

    @tf.function(autograph=False)
    def step(first, second):
        def replica():
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            return see(*(second if tf.get_static_value(number) else first))

        return strategy().run(replica)

    program = step.get_concrete_function(specs, specs)
    found = program(*([tf.constant(x) for x in local(k)] for k in (0, 1)))
    return [[x.values[k].numpy() for x in found] for k in (0, 1)]


def test_rows_of_all_replicas_hold_what_each_of_them_had():
    large = np.array([2**62 + 1, -(2**53) - 1])
    half = np.array([[np.inf, 6e-8], [np.nan, -1.0]], "float16")
    wide = np.array([0.1, 1e300])
    flags, bytes_ = np.array([True, False]), np.array([[255], [3]], "uint8")
    rows = [large, half, wide, flags, bytes_]
    # The second has none, and does not know the length of the others' rows.
    empty = [np.zeros((0,) * x.ndim, x.dtype) for x in rows]
    for found in gathered(lambda number: empty if number else rows, [2, 0]):
        for mine, due in zip(found, rows, strict=True):
            assert mine.dtype == due.dtype
            np.testing.assert_array_equal(mine, due)
    halves = [[x[:1] for x in rows], [x[1:] for x in rows]]
    for found in gathered(lambda number: halves[number], [1, 1]):
        for mine, due in zip(found, rows, strict=True):
            np.testing.assert_array_equal(mine, due)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ([(2, 3), (1, 4)], "must have the same lengths where a loss sees all rows"),
        ([(2, 3), (2, 3)], "must have one entry per row"),
    ],
    ids=["lengths", "rows"],
)
def test_arrays_that_do_not_fit_are_refused_on_all_replicas(shapes, text):
    with pytest.raises(tf.errors.InvalidArgumentError, match=text):
        gathered(lambda number: [np.zeros(shapes[number])], [2, 1])


def test_only_numbers_are_gathered():
    with pytest.raises(ValueError, match=r"must hold numbers\. Got string"):
        gathered(lambda number: [np.array(["a"], dtype=object)], [1, 1])
