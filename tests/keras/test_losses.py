"""Every reduction, with every kind of weight and mask, equals plain Keras on the whole batch."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras import problems
from tests.keras.backends import supported
from tests.keras.problems import compiled, crossentropy
from tests.keras.training import MICRO, ROWS, Case, assert_equals_keras, in_tiers, train

import virtualbatch.keras as vb

REDUCTIONS = ["sum_over_batch_size", "sum", "mean_with_sample_weight", None]

NARROW = ("weights narrower than the mask",)

ROWS_DATA = (problems.X, problems.LABELS)
TOKEN_DATA = (problems.WORD_IDS, problems.TOKEN_LABELS)

# Unlike the others, this one makes a whole window weigh nothing.
EMPTY_IDS = np.where(np.arange(len(problems.X))[:, None] < 50, 0, problems.WORD_IDS)


def number(y_true, y_pred):
    """A loss function that reduces by itself."""
    return ops.mean(ops.square(y_pred - ops.cast(y_true, y_pred.dtype)[..., None]))


class Number(keras.losses.Loss):
    """The same as an object, which Keras weights and reduces once more."""

    def call(self, y_true, y_pred):
        return number(y_true, y_pred)


class Matrix(keras.losses.Loss):
    """One value per row and class."""

    def call(self, y_true, y_pred):
        return ops.square(y_pred - ops.cast(y_true, y_pred.dtype)[..., None])


class Column(keras.losses.Loss):
    """One value per row, in a column, which weights of shape (rows, 3) stretch."""

    def call(self, y_true, y_pred):
        values = ops.square(y_pred - ops.cast(y_true, y_pred.dtype)[..., None])
        return ops.mean(values, -1, keepdims=True)


class OwnCall(keras.losses.Loss):
    """A loss that leaves nothing to Keras."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        return number(y_true, y_pred)


class OwnCallPerRow(keras.losses.Loss):
    """The same with one value per row, which nobody reduces."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


def weighted(weights):
    return {"sample_weight": weights}


def reduced(reduction, **options):
    return compiled(loss=lambda: crossentropy(reduction=reduction, **options), metrics=None)


def cases_of(reduction):
    loss = reduced(reduction)
    rows = (problems.classifier, loss, *ROWS_DATA)
    tokens = (problems.tagger, loss, *TOKEN_DATA)
    by_row, by_token = problems.ROW_WEIGHTS, problems.TOKEN_WEIGHTS
    ignoring = reduced(reduction, ignore_class=0)
    cases = [
        Case(f"{reduction}", *rows),
        Case(f"{reduction}, row weights", *rows, weighted(by_row)),
        Case(f"{reduction}, masks", *tokens),
        Case(f"{reduction}, masks, row weights", *tokens, weighted(by_row[:, None]), needs=NARROW),
        Case(f"{reduction}, masks, token weights", *tokens, weighted(by_token)),
        Case(f"{reduction}, masks, ignore_class", problems.tagger, ignoring, *TOKEN_DATA),
    ]
    unreduced = () if reduction else ("unreduced losses",)
    return [case._replace(needs=case.needs + unreduced) for case in cases]


REASON = "other pairs of a reduction, weights and masks"
REDUCED = {case.name: case for reduction in REDUCTIONS for case in cases_of(reduction)}

CASES = supported([
    # With a short last batch.
    REDUCED.pop("sum_over_batch_size, masks, token weights")._replace(rows=ROWS),
    *(REDUCED.pop(name) for name in (
        "sum_over_batch_size, row weights", "sum_over_batch_size, masks",
        "sum_over_batch_size, masks, ignore_class", "sum, masks, token weights",
        "mean_with_sample_weight, row weights", "mean_with_sample_weight, masks, token weights",
        "None, masks, token weights")),
    Case("class_weight", problems.classifier, compiled(), *ROWS_DATA,
         {"class_weight": {0: 1.0, 1: 3.0, 2: 0.2}}),
    Case("a whole batch masked", problems.tagger, compiled(), EMPTY_IDS, problems.TOKEN_LABELS),
    Case("a micro-batch of weight 0", problems.classifier, reduced("mean_with_sample_weight"),
         *ROWS_DATA, weighted(problems.ROW_WEIGHTS * (np.arange(len(problems.X)) >= MICRO))),
    Case("values in a matrix", problems.classifier,
         compiled(loss=Matrix), *ROWS_DATA, weighted(problems.ROW_WEIGHTS[:, None])),
    Case("a function of one number, masks, token weights", problems.tagger,
         compiled(loss=lambda: number), *TOKEN_DATA, weighted(problems.TOKEN_WEIGHTS)),
    Case("a __call__ of its own", problems.classifier, compiled(loss=OwnCall), *ROWS_DATA),
    Case("mask from activations", lambda: masked_by_sign(), compiled(),
         problems.SERIES, problems.TOKEN_LABELS),
    Case("one number, mean_with_sample_weight, masks, row weights", problems.tagger,
         compiled(loss=lambda: Number(reduction="mean_with_sample_weight"), metrics=None),
         *TOKEN_DATA, weighted(problems.ROW_WEIGHTS[:, None]), needs=NARROW),
])  # fmt: skip

FURTHER = supported([
    *REDUCED.values(),
    Case("mean, masks", problems.tagger, reduced("mean"), *TOKEN_DATA),
    Case("ignore_class, token weights", lambda: problems.tagger(False),
         reduced("mean_with_sample_weight", ignore_class=1), *TOKEN_DATA,
         weighted(problems.TOKEN_WEIGHTS)),
    Case("negative weights, masks", problems.tagger, reduced("mean_with_sample_weight"),
         *TOKEN_DATA, weighted(problems.TOKEN_WEIGHTS - 0.3)),
    Case("a loss by name", problems.classifier,
         compiled(loss="mse", metrics=["mae"]), problems.X, np.eye(3)[problems.LABELS]),
    Case("weights wider than the values", problems.classifier,
         compiled(loss=Column), *ROWS_DATA, weighted(problems.TOKEN_WEIGHTS[:, :3])),
    Case("a function of one number", problems.classifier,
         compiled(loss=lambda: number), *ROWS_DATA),
    Case("a function of one number, row weights", problems.classifier,
         compiled(loss=lambda: number), *ROWS_DATA, weighted(problems.ROW_WEIGHTS)),
    *(
        Case(f"one number, {reduction}, masks, row weights", problems.tagger,
             compiled(loss=lambda reduction=reduction: Number(reduction=reduction), metrics=None),
             *TOKEN_DATA, weighted(problems.ROW_WEIGHTS[:, None]), needs=needs)
        for reduction, needs in [("sum", NARROW), (None, (*NARROW, "unreduced losses"))]
    ),
    Case("a __call__ of its own, per row", problems.classifier,
         compiled(loss=OwnCallPerRow), *ROWS_DATA, needs=("unreduced losses",)),
])  # fmt: skip


class PositiveOnly(layers.Layer):
    """Masks by what it is given."""

    def compute_mask(self, inputs, mask=None):
        return ops.mean(inputs, -1) > 0

    def call(self, inputs):
        return inputs


def masked_by_sign():
    return keras.Sequential([keras.Input((7, 4)), layers.Dense(4), PositiveOnly(), layers.Dense(3)])


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case)


@pytest.mark.parametrize(
    "loss",
    [
        lambda: number,
        *(
            pytest.param(loss, marks=pytest.mark.thorough("another loss that returns one number"))
            for loss in (OwnCall, keras.losses.Dice)
        ),
    ],
)
def test_a_loss_of_one_number_is_named_once(loss, caplog):
    y = np.eye(3)[problems.LABELS] if isinstance(loss(), keras.losses.Dice) else problems.LABELS
    sizes = {"microbatch_size": MICRO, "gather": False}
    options = compiled(loss=loss, metrics=None)
    case = Case("", problems.classifier, options, problems.X, y, sizes=sizes)
    train(case, accumulated=True)
    said = [record.getMessage() for record in caplog.records if record.name == "virtualbatch"]
    assert len(said) == 1
    assert "returns one number: it is treated as one mean over rows" in said[0]


def test_weights_that_are_no_positive_numbers_count_as_keras_counts_them():
    # In a compiled step nobody reads them. Where their total is 0, Keras' loss is 0.
    models = [problems.classifier() for _ in range(2)]
    for model, eager in zip(models, (False, True), strict=True):
        model.compile(
            keras.optimizers.SGD(0.1),
            crossentropy(reduction="mean_with_sample_weight"),
            run_eagerly=eager,
        )
    vb.accumulate(models[0], microbatch_size=4)
    ours, plain = models
    start = plain.get_weights()
    rows = [leaf[:12] for leaf in ROWS_DATA]
    for first, last in ((1.0, -0.25), (1.0, -1.0), (np.nan, 1.0), (1.0, np.inf)):
        weights = np.repeat([first, 0.0, last], 4)
        losses = []
        for model in models:
            model.set_weights(start)
            losses.append(float(model.train_on_batch(*rows, sample_weight=weights)))
        assert np.isnan(losses[1]) == (not np.isfinite(first + last))
        for found, due in zip(
            [losses[0], *ours.get_weights()], [losses[1], *plain.get_weights()], strict=True
        ):
            np.testing.assert_allclose(found, due, rtol=1e-9, atol=1e-12)
