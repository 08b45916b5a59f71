"""Several outputs, each with a loss, mask, weights and metrics of its own, equal plain Keras."""

import keras
import pytest
from keras import layers
from tests.keras import problems
from tests.keras.backends import supported
from tests.keras.problems import FEATURES, TOKENS, WORDS, X, compiled, crossentropy
from tests.keras.training import Batches, Case, assert_equals_keras, in_tiers, train

LABELS, TARGETS = problems.LABELS, problems.TARGETS
WEIGHTS = [problems.ROW_WEIGHTS, problems.ROW_WEIGHTS[::-1].copy()]


def heads():
    inputs = keras.Input((FEATURES,))
    hidden = layers.Dense(4, activation="tanh")(inputs)
    return inputs, layers.Dense(3, name="a")(hidden), layers.Dense(2, name="b")(hidden)


def two_in_a_list():
    inputs, a, b = heads()
    return keras.Model(inputs, [a, b])


def two_in_a_dict():
    inputs, a, b = heads()
    return keras.Model(inputs, {"a": a, "b": b})


class Nested(keras.Model):
    """Inputs and outputs in dicts of tuples and lists."""

    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(3), layers.Dense(2)

    def call(self, inputs):
        p, (q,) = inputs["p"], inputs["q"]
        return {"u": (self.a(p),), "v": [self.b(q), self.b(p)]}


def two_masks():
    """Two sentences, masked apart, and a third output without a mask."""
    first, second = keras.Input((TOKENS,), dtype="int32"), keras.Input((TOKENS,), dtype="int32")
    a = layers.Dense(3, name="a")(layers.Embedding(WORDS, 4, mask_zero=True)(first))
    words = layers.Embedding(WORDS, 4, mask_zero=True)(second)
    b = layers.Dense(3, name="b")(words)
    c = layers.Dense(3, name="c")(layers.Flatten()(layers.Embedding(WORDS, 4)(second)))
    return keras.Model([first, second], [a, b, c])


def losses(first="sum_over_batch_size", second="sum_over_batch_size"):
    return [crossentropy(reduction=first), keras.losses.MeanSquaredError(reduction=second)]


def by_name(values):
    return dict(zip("ab", values, strict=True))


def nested_rows():
    inputs = {"p": X, "q": (2 * X,)}
    return Batches(inputs, {"u": (LABELS,), "v": (TARGETS, -TARGETS)})


IDS = [problems.WORD_IDS, problems.OTHER_IDS]
TAGS = [problems.TOKEN_LABELS, problems.TOKEN_LABELS, LABELS]
TAG_WEIGHTS = [problems.TOKEN_WEIGHTS, problems.TOKEN_WEIGHTS[::-1].copy(), problems.ROW_WEIGHTS]


def tagging(*reductions):
    return compiled(
        loss=lambda: [crossentropy(reduction=reduction) for reduction in reductions],
        loss_weights=[1.0, 0.5, 2.0],
        weighted_metrics=[["accuracy"]] * 3,
        metrics=None,
    )


DOUBLE = ("masked weights in metrics",)

REASON = "other spellings of the outputs and weights of the quick cases"

CASES = supported([
    Case("lists, a weight per output", two_in_a_list,
         compiled(loss=losses, metrics=None, weighted_metrics=[["accuracy"], ["mse"]]),
         X, [LABELS, TARGETS], {"sample_weight": WEIGHTS}),
    Case("dicts", two_in_a_dict,
         compiled(loss=lambda: by_name(losses("mean_with_sample_weight", "sum")),
                  loss_weights={"a": 0.3, "b": 2.0}, metrics={"b": "mse"},
                  weighted_metrics={"a": "accuracy", "b": "mae"}),
         X, {"a": LABELS, "b": TARGETS}, {"sample_weight": by_name(WEIGHTS)}),
    Case("deeply nested", Nested,
         compiled(loss=lambda: {"u": (crossentropy(),), "v": ["mse", "mae"]}, metrics=None),
         nested_rows),
    Case("masks apart, mean sum mean_with", two_masks,
         tagging("mean", "sum", "mean_with_sample_weight"), IDS, TAGS),
    Case("masks apart, token weights", two_masks,
         tagging("mean_with_sample_weight", "mean", "sum"), IDS, TAGS,
         {"sample_weight": TAG_WEIGHTS}, needs=DOUBLE),
])  # fmt: skip

FURTHER = supported([
    Case("lists, loss_weights, metrics", two_in_a_list,
         compiled(loss=losses, loss_weights=[0.3, 2.0], metrics=[["accuracy"], ["mse", "mae"]]),
         X, [LABELS, TARGETS]),
    Case("one weight for all outputs", two_in_a_list,
         compiled(loss=losses, metrics=None, weighted_metrics=[["accuracy"], ["mse"]]),
         X, [LABELS, TARGETS], {"sample_weight": WEIGHTS[0]}),
    Case("dict of losses for a list", two_in_a_list,
         compiled(loss=lambda: by_name(losses()), metrics=None),
         X, {"a": LABELS, "b": TARGETS}),
    Case("masks apart, eager", two_masks, lambda: tagging("mean", "mean", "mean")()
         | {"run_eagerly": True}, IDS, TAGS, {"sample_weight": TAG_WEIGHTS}, needs=DOUBLE),
])  # fmt: skip


WITHOUT_A_LOSS = [
    Case("an output without loss", two_in_a_list,
         compiled(loss=lambda: [crossentropy(), None], metrics=None), X, [LABELS, TARGETS]),
    Case("a dict without one loss", two_in_a_dict,
         compiled(loss=lambda: {"b": keras.losses.MeanSquaredError()}, metrics=None),
         X, {"a": LABELS, "b": TARGETS}),
]  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case)


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
@pytest.mark.parametrize("case", in_tiers(WITHOUT_A_LOSS[:1], WITHOUT_A_LOSS[1:], REASON))
def test_an_output_without_loss_equals_keras(case):
    assert_equals_keras(case)


def test_one_of_several_losses_must_not_be_unreduced():
    case = Case("", two_in_a_list, compiled(loss=lambda: losses(None), metrics=None),
                X, [LABELS, TARGETS])  # fmt: skip
    with pytest.raises(ValueError, match="Got reduction=None for a") as refusal:
        train(case, accumulated=True)
    assert 'Use reduction="sum", which has the same gradient' in str(refusal.value)
