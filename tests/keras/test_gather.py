"""Losses that couple rows equal plain Keras on the whole batch; see `tests.keras.coupled`."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras.backends import BACKEND, supported
from tests.keras.coupled import (
    CASES,
    CLASSES,
    FEATURES,
    HEADS,
    MASKS,
    MICRO,
    TAGS_AND_MASKS,
    TEMPERATURE,
    UNOPTIMISED,
    VALUES,
    X,
    clip,
    coupled,
    mlp,
    three_heads,
)
from tests.keras.packing import IDS, PACKED
from tests.keras.running_out import BATCH, Points, Y, assert_same, model, state
from tests.keras.running_out import X as POINTS
from tests.keras.training import Case, assert_equals_keras, eagerly, in_tiers
from tests.oracle import assert_close

import virtualbatch.keras as vb
from virtualbatch.keras._window import WindowModel

EAGERLY = {"run_eagerly": BACKEND != "jax"}
DICE = mlp(6, "sigmoid"), keras.losses.Dice, X, MASKS


def shorter(case):
    """Two equal batches, of which each is one shape and so one program; or two eager ones."""
    if BACKEND == "tensorflow" and case is HEADS:
        case = eagerly(case)
    fit = case.fit | {"epochs": 2}
    return case._replace(name=f"{case.name}, two batches", fit=fit, rows=40)


@pytest.mark.parametrize(
    "case",
    in_tiers(
        map(shorter, [TEMPERATURE, HEADS]),
        supported([TAGS_AND_MASKS, *CASES]),
        "another coupled loss on the same path",
    ),
)
def test_equals_keras(case):
    """Weights, logs and their keys, over batches that are cut evenly and are not."""
    # A graph weighs the losses of several outputs by the batch, not by its rows.
    # JAX compiles one program in less time than each of its operations.
    in_its_mode = BACKEND == "jax" or case in (HEADS, TAGS_AND_MASKS)
    assert_equals_keras(case, in_its_mode=in_its_mode)


def adamw():
    rate = keras.optimizers.schedules.ExponentialDecay(1e-2, 2, 0.9)
    return keras.optimizers.AdamW(rate, 1e-2, clipnorm=0.1, use_ema=True, ema_momentum=0.9)


MODES = [
    coupled("eager", *DICE, run_eagerly=lambda: True),
    coupled("compiled", *DICE, jit_compile=lambda: True, needs=("jit_compile",)),
    coupled("steps", *DICE, steps_per_execution=lambda: 2, needs=("steps_per_execution",)),
    coupled("adamw", *DICE, optimizer=adamw),
    coupled("everything", *DICE, sizes={"gather": True}, metrics=lambda: ["mae"]),
]


@pytest.mark.thorough("modes of Keras and optimizers, around the same window")
@pytest.mark.parametrize("case", supported(MODES), ids=lambda case: case.name)
def test_modes_equal_keras(case):
    assert_equals_keras(case)


def with_state():
    """Layers that draw random numbers, and that normalise by a micro-batch."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.BatchNormalization(momentum=0.5),
            layers.Dense(16, activation="tanh"),
            layers.Dropout(0.3, seed=5),
            layers.Dense(6, activation="sigmoid"),
        ]
    )


class InOneGraph(keras.Model):
    """The same micro-batches of 20 rows, which Keras differentiates all at once."""

    def __init__(self):
        super().__init__()
        self.model = with_state()

    def call(self, x, training=False):
        pieces = [x[0:7], x[7:14], x[14:20]]
        return ops.concatenate([self.model(piece, training=training) for piece in pieces])


def trained(model, loss, epochs=1, **sizes):
    """A model and its logs after whole batches of 20 rows."""
    keras.utils.set_random_seed(1)
    model = model()
    # Keras compiles for as long as it takes to run this without.
    model.compile(keras.optimizers.SGD(0.1), loss, **(UNOPTIMISED if sizes else EAGERLY))
    if sizes:
        vb.accumulate(model, **sizes)
    fitted = model.fit(X[:40], MASKS[:40], batch_size=20, epochs=epochs, shuffle=False, verbose=0)
    return model, fitted.history["loss"]


def test_random_numbers_and_statistics_equal_the_same_microbatches_in_one_graph():
    """Each pass draws the same masks; afterwards seeds stand as after one pass."""
    expected, losses = trained(InOneGraph, keras.losses.Dice(), epochs=2)
    actual, found = trained(with_state, keras.losses.Dice(), epochs=2, microbatch_size=MICRO)
    assert_close(found, losses, 1e-12)
    for a, b in zip(actual.trainable_variables, expected.trainable_variables, strict=True):
        assert_close(a.numpy(), b.numpy(), 1e-12)
    seeds = [model._flatten_layers() for model in (actual, expected)]
    states = [
        [g.state.numpy() for layer in found for g in layer._seed_generators] for found in seeds
    ]
    np.testing.assert_array_equal(*states)


def test_moving_averages_take_one_update_per_batch():
    """Those of the first layer are of the data alone, so they equal plain Keras."""
    plain, _ = trained(with_state, keras.losses.Dice())
    actual, _ = trained(with_state, keras.losses.Dice(), microbatch_size=MICRO)
    for a, b in zip(actual.layers[0].variables[2:], plain.layers[0].variables[2:], strict=True):
        assert_close(a.numpy(), b.numpy(), 1e-12)


@pytest.fixture
def gathered(monkeypatch):
    """Numbers of predictions that windows gather, one for each micro-batch that is run."""
    seen = []
    arrays = WindowModel.arrays

    def noted(self, *args):
        found = arrays(self, *args)
        seen.append(len(found) // 2)
        return found

    monkeypatch.setattr(WindowModel, "arrays", noted)
    return seen


def accumulating(model, loss, sizes=None, **options):
    model = model()
    model.compile("sgd", loss, **EAGERLY | options)
    vb.accumulate(model, **{"microbatch_size": MICRO} | (sizes or {}))
    return model


def test_only_outputs_that_need_it_are_gathered(gathered):
    loss = {"embedded": clip, "segmented": keras.losses.Dice(), "valued": "mse"}
    y = {"embedded": VALUES, "segmented": MASKS, "valued": VALUES}
    model = accumulating(three_heads, loss)
    model.train_on_batch(X[:20], keras.tree.map_structure(lambda found: found[:20], y))
    assert set(gathered) == {2}


def test_one_microbatch_and_losses_of_rows_are_not_gathered(gathered, caplog):
    accumulating(mlp(6, "sigmoid"), keras.losses.Dice()).train_on_batch(X[:7], MASKS[:7])
    model = accumulating(mlp(6, "sigmoid"), "binary_crossentropy", metrics=["mae"])
    model.train_on_batch(X[:20], MASKS[:20])
    assert gathered == []
    assert not [line for line in caplog.messages if "more forward" in line]


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "virtualbatch"]


def per_row(y_true, y_pred):
    """A value per row that reads the rows of its class, of which there may be no other."""
    same = ops.cast(ops.equal(y_true[:, None], y_true[None]), y_pred.dtype)
    same = same * (1 - ops.eye(ops.shape(y_pred)[0], dtype=y_pred.dtype))
    return ops.sum(same * ops.matmul(y_pred, ops.transpose(y_pred)), 1)


def test_what_is_gathered_is_said_once(caplog):
    model = accumulating(
        lambda: keras.Model(
            i := keras.Input((FEATURES,)), [layers.Dense(6, "sigmoid")(i), layers.Dense(4)(i)]
        ),
        [keras.losses.Dice(), per_row],
    )
    # No two rows share a class.
    targets = [MASKS[:20], np.arange(20)]
    for _ in range(2):
        model.train_on_batch(X[:20], targets)
    assert lines(caplog) == [
        "The losses dice returns one number and per_row compares rows: both get the predictions of "
        "all rows, at the cost of one more forward pass. gather=False treats dice as a mean over "
        "rows."
    ]


def test_without_gathering_both_kinds_of_loss_are_named(caplog):
    model = accumulating(mlp(4), per_row, {"gather": False})
    model.train_on_batch(X[:20], np.arange(20) % 2)
    (line,) = lines(caplog)
    assert "gather=False is set, but per_row gives a row another value when the other rows" in line
    assert "Got values that differ by" in line


def test_another_loss_is_looked_at_anew(gathered):
    model = accumulating(mlp(6, "sigmoid"), "mse")
    model.train_on_batch(X[:20], MASKS[:20])
    assert gathered == []
    model.compile("sgd", keras.losses.Dice(), **EAGERLY)
    model.train_on_batch(X[:20], MASKS[:20])
    assert set(gathered) == {1}


class Growing(keras.utils.PyDataset):
    """Batches of the first so many rows."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return X[: self.rows[index]], CLASSES[: self.rows[index]]


@pytest.mark.parametrize(
    "first", [1, pytest.param(3, marks=pytest.mark.thorough("a few rows, which tell at once"))]
)
def test_a_first_batch_of_one_microbatch_settles_nothing(first):
    """A graph that is traced for any rows serves the larger batches that follow."""

    def after(sizes):
        keras.utils.set_random_seed(1)
        model = mlp(6)()
        options = UNOPTIMISED if sizes else EAGERLY
        model.compile(keras.optimizers.SGD(0.1), per_row, **options)
        if sizes:
            vb.accumulate(model, **sizes)
        model.fit(Growing([first, 20]), shuffle=False, verbose=0)
        return model.get_weights()

    for found, due in zip(after({"microbatch_size": MICRO}), after({}), strict=True):
        assert_close(found, due, 1e-12)


@pytest.mark.parametrize("gather", ["all", 1, np.True_])
def test_what_gather_may_be(gather):
    with pytest.raises(TypeError, match=r"gather must be None, True or False\. Got gather="):
        accumulating(mlp(6), "mse", {"gather": gather})


class RunsAgain(keras.Model):
    def __init__(self):
        super().__init__()
        self.encoder = layers.Dense(6, name="encoder")

    def call(self, x):
        return self.encoder(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(y_pred - self.encoder(ops.flip(x, 0))))


def test_a_compute_loss_that_runs_layers_is_named(caplog):
    accumulating(RunsAgain, None).train_on_batch(X[:20], MASKS[:20])
    assert len(lines(caplog)) == 2
    assert "compute_loss sees all rows at once and runs encoder on them" in lines(caplog)[1]


def test_a_noise_scale_is_refused():
    model = accumulating(mlp(6, "sigmoid"), keras.losses.Dice())
    with pytest.raises(ValueError, match=r"a mean over rows\. Got a loss that sees all rows\."):
        model.fit(X, MASKS, batch_size=20, verbose=0, callbacks=[vb.NoiseScale()])


class OfTheBatch(layers.Layer):
    def call(self, x):
        return ops.mean(x, 0)


def test_predictions_that_are_not_of_rows_are_refused():
    def model():
        inputs = keras.Input((FEATURES,))
        return keras.Model(inputs, OfTheBatch()(layers.Dense(6)(inputs)))

    def anything(y_true, y_pred):
        return ops.mean(y_pred)

    with pytest.raises(ValueError, match=r"must have one entry per row\. Got .* for .* rows\."):
        accumulating(model, anything).train_on_batch(X[:20], MASKS[:20])


@pytest.mark.proves_itself
def test_a_coupled_loss_proves_itself_and_is_certified():
    model = accumulating(lambda: mlp(16)(), clip)
    model.train_on_batch(X[:20], VALUES[:20])
    assert vb.certify(model, (X[:20], VALUES[:20]), microbatch_size=MICRO).exact
    vb.accumulate(model, microbatch_size=MICRO, gather=False)
    assert not vb.certify(model, (X[:20], VALUES[:20]), microbatch_size=MICRO).exact


def rows_of_words():
    inputs = keras.Input((None,), dtype="int32")
    words = layers.Embedding(20, 8, mask_zero=True)(inputs)
    tags = layers.Dense(3)(layers.Dense(8, activation="tanh")(words))
    rows = layers.Dense(16)(layers.GlobalAveragePooling1D()(words))
    return keras.Model(inputs, [tags, rows])


def neighbours(y_true, y_pred):
    """A loss that knows the order of rows."""
    return ops.mean(ops.square(y_pred[1:] - 2 * y_pred[:-1]))


@pytest.mark.parametrize(
    "gather",
    # Where programs are compiled, tokens cost as much again.
    [
        True if BACKEND == "torch" else None,
        pytest.param(
            None if BACKEND == "torch" else True, marks=pytest.mark.thorough("the same window")
        ),
    ],
)
def test_packed_rows_equal_keras(gather):
    """Rows come back in their order; trimmed predictions as long as they were."""

    def arguments():
        words = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        given = {"optimizer": "sgd", "loss": [words, neighbours], "metrics": [[], ["mae"]]}
        return given | UNOPTIMISED

    rows = np.random.default_rng(2).normal(size=(len(IDS), 16))
    targets = [IDS % 3, rows]
    assert_equals_keras(
        Case(
            "",
            rows_of_words,
            arguments,
            IDS,
            targets,
            {"epochs": 1},
            PACKED | {"gather": gather},
        )
    )


@pytest.mark.thorough("half precision, where plain Keras is rounding itself")
def test_a_scaled_loss_is_scaled_once():
    """Within the rounding of half precision, weights move as without it."""

    def made():
        policy = keras.DTypePolicy("mixed_float16")
        # On TensorFlow, Keras itself adds no losses of several dtypes.
        added = None if BACKEND == "tensorflow" else "l2"
        return keras.Sequential(
            [
                keras.Input((FEATURES,)),
                layers.Dense(16, activation="tanh", dtype=policy, activity_regularizer=added),
                layers.Dense(6, activation="sigmoid", dtype="float32"),
            ]
        )

    def one(accumulated):
        keras.utils.set_random_seed(1)
        model = made()
        optimizer = keras.optimizers.SGD(0.1)
        model.compile(
            keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0),
            keras.losses.Dice(),
        )
        if accumulated:
            vb.accumulate(model, microbatch_size=MICRO)
        model.fit(X, MASKS, batch_size=20, shuffle=False, verbose=0)
        return [variable.numpy() for variable in model.trainable_variables]

    for found, due in zip(one(True), one(False), strict=True):
        assert_close(found, due, 5e-3)


def test_memory_that_runs_out_is_asked_for_less():
    """The update is that of the smaller micro-batches, random numbers and statistics included."""

    def fitted(size, points=None):
        found = model(points)
        found.compile(keras.optimizers.Adam(1e-2), number, metrics=["accuracy"], **UNOPTIMISED)
        vb.accumulate(found, microbatch_size=size)
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        history = found.fit(POINTS, Y, **options)
        return history.history, state(found)

    def number(y_true, y_pred):
        return keras.losses.Dice()(ops.one_hot(ops.cast(y_true, "int32"), 3), ops.softmax(y_pred))

    history, after = fitted(12, Points([0]))
    due, due_after = fitted(6)
    assert history == due
    assert_same(after, due_after)


@pytest.mark.usefixtures("untimed_plans")
def test_a_plan_is_that_of_the_gathered_step(gathered):
    options = mlp(6, "sigmoid")()
    options.compile("sgd", keras.losses.Dice(), **UNOPTIMISED)
    found = vb.plan(options, (X, MASKS))
    assert set(gathered) == {1}
    assert found.microbatch_size <= len(X)
