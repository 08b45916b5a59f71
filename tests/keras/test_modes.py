"""How Keras runs a model, and how a batch is cut, changes nothing."""

import keras
import numpy as np
import pytest
from tests.keras import problems
from tests.keras.backends import supported
from tests.keras.problems import X, compiled
from tests.keras.training import Case, assert_equals_keras, in_tiers
from tests.oracle import assert_close

import virtualbatch.keras as vb

LABELS = problems.LABELS
MASKED = (problems.WORD_IDS, problems.TOKEN_LABELS)


def tagged(name, *needs, **options):
    return Case(name, problems.tagger, compiled(**options), *MASKED, needs=needs)


def cut(name, rows=130, batch_size=50, **sizes):
    fit = {"batch_size": batch_size}
    return Case(name, problems.classifier, compiled(), X, LABELS, fit, sizes, rows=rows)


REASON = "other sizes and modes, and two of them together"

CASES = supported([
    tagged("jit_compile=True", "jit_compile", jit_compile=True),
    tagged("jit_compile=False", jit_compile=False),
    tagged("run_eagerly", run_eagerly=True),
    tagged("steps_per_execution=2", "steps_per_execution", steps_per_execution=2),
    cut("micro-batches of one row", microbatch_size=1),
    cut("micro-batches larger than the batch", microbatch_size=1000),
    cut("accumulation_steps", accumulation_steps=7),
    cut("both sizes, a short last batch", microbatch_size=16, accumulation_steps=4),
    cut("a last batch of one row", rows=101, microbatch_size=16),
])  # fmt: skip

FURTHER = supported([
    tagged("steps_per_execution=7, jit", "steps_per_execution", "jit_compile",
           steps_per_execution=7, jit_compile=True),
    cut("micro-batches that divide the batch", microbatch_size=25),
    cut("more accumulation_steps than rows", accumulation_steps=60),
    cut("batches of one row", rows=5, batch_size=1, microbatch_size=16),
    cut("sizes of NumPy", microbatch_size=np.int64(16)),
])  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case, in_its_mode="batch_size" not in case.fit)


def test_callbacks_steer_as_ever():
    def callbacks():
        return [
            keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 / (1 + epoch)),
            keras.callbacks.EarlyStopping("loss", min_delta=10.0, patience=1),
            keras.callbacks.TerminateOnNaN(),
        ]

    case = Case("", problems.classifier, compiled(), X, LABELS, {"callbacks": callbacks})
    run = assert_equals_keras(case)
    assert len(run.history["loss"]) == 2


def per_row(y_true, y_pred):
    return keras.ops.max(y_pred, -1)


def life(accumulates, **mode):
    """A model that is trained, accumulates, changes its size, is compiled again and restored."""
    keras.utils.set_random_seed(3)
    model = problems.classifier()
    model.compile(**compiled(optimizer="adam")(), **mode)
    seen = []

    def fit(**options):
        history = model.fit(X, LABELS, batch_size=50, epochs=2, verbose=0, shuffle=False, **options)
        seen.extend(history.history.values())

    def change(function, **options):
        if accumulates:
            function(model, **options)

    fit()
    change(vb.accumulate, microbatch_size=16)
    fit()
    change(vb.accumulate, microbatch_size=7)
    change(vb.accumulate, accumulation_steps=3)
    fit(class_weight={0: 1.0, 1: 2.0, 2: 3.0})
    again = compiled(optimizer="sgd", metrics=["accuracy", per_row], jit_compile=False)
    model.compile(**again(), **mode)
    fit()
    seen.append(model.evaluate(X, LABELS, verbose=0, batch_size=40))
    seen.append(model.test_on_batch(X[:9], LABELS[:9]))
    seen.append(model.predict(X, verbose=0))
    for rows in (50, 50, 10, 1, 130):
        seen.append(model.train_on_batch(X[:rows], LABELS[:rows]))
    seen.append(model.train_on_batch(X, LABELS, class_weight={0: 1.0, 1: 2.0, 2: 3.0}))
    weighted = model.train_on_batch(X, LABELS, problems.ROW_WEIGHTS, return_dict=True)
    seen.extend(weighted.values())
    change(vb.restore)
    assert "train_step" not in vars(model)
    assert "make_train_function" not in vars(model)
    fit()
    change(vb.restore)
    return [*seen, *model.get_weights()]


@pytest.mark.parametrize(
    "mode",
    [
        {"run_eagerly": True},
        pytest.param({}, marks=pytest.mark.thorough("compiles a program at every turn")),
    ],
    ids=str,
)
def test_a_model_may_change_its_mind(mode):
    for actual, expected in zip(life(True, **mode), life(False, run_eagerly=True), strict=True):
        assert_close(actual, expected, 1e-10)


def test_train_on_batch_eagerly():
    results = []
    for accumulates in (True, False):
        keras.utils.set_random_seed(3)
        model = problems.tagger()
        model.compile(**compiled(run_eagerly=True)())
        if accumulates:
            vb.accumulate(model, microbatch_size=16)
        results.append(
            [
                model.train_on_batch(problems.WORD_IDS[:rows], problems.TOKEN_LABELS[:rows])
                for rows in (50, 10, 1)
            ]
        )
    assert_close(results[0], results[1], 1e-10)


class Seen(keras.layers.Layer):
    """Notes how many rows it is called with."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def call(self, x):
        self.rows.append(x.shape[0])
        return x


def test_after_restore_batches_are_whole_again():
    # The program that Keras kept would go on cutting them, with the same weights at the end.
    layer = Seen()
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    x = np.ones((4, 3))
    vb.accumulate(model, microbatch_size=2)
    model.fit(x, x[:, :1], batch_size=4, verbose=0)
    layer.rows.clear()
    vb.restore(model)
    model.fit(x, x[:, :1], batch_size=4, verbose=0)
    assert layer.rows
    assert 2 not in layer.rows
