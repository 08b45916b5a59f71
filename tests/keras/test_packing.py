"""Rows packed by tokens train as plain Keras trains on the padded batch."""

import logging

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras.backends import supported
from tests.keras.packing import IDS, LABELS, MASK, PACKED, ROW_LABELS, WEIGHTS, length_of, tagger
from tests.keras.problems import CLASSES, TOKENS, WORDS, compiled, crossentropy
from tests.keras.running_out import Model, Points
from tests.keras.training import BATCH, ROWS, Case, assert_equals_keras, in_tiers
from tests.oracle import assert_close

import virtualbatch.keras as vb

_random = np.random.default_rng(6)


class Masked(layers.Layer):
    """Mean over the words of a row, padding left out; its square is a loss of each row."""

    def call(self, inputs):
        ids, x = inputs
        valid = ops.cast(ids != 0, x.dtype)[..., None]
        mean = ops.sum(x * valid, 1) / ops.sum(valid, 1)
        self.add_loss(ops.square(mean))
        return mean


def attentive():
    """Words that see each other, but no padding."""
    ids = keras.Input((None,), dtype="int32")
    x = layers.Embedding(WORDS, 4, mask_zero=True)(ids)
    x = layers.Attention()([x, x])
    return keras.Model(ids, layers.Dense(CLASSES)(x))


def classifier():
    """Word ids of any length -> logits per row."""
    ids = keras.Input((None,), dtype="int32")
    x = layers.Embedding(WORDS, 4)(ids)
    return keras.Model(ids, layers.Dense(CLASSES)(Masked()([ids, x])))


def two_inputs():
    """Word ids and a number of the row, by name."""
    ids, other = keras.Input((None,), dtype="int32", name="ids"), keras.Input((2,), name="other")
    x = layers.Embedding(WORDS, 4)(ids)
    x = layers.Concatenate()([Masked()([ids, x]), other])
    return keras.Model({"ids": ids, "other": other}, layers.Dense(CLASSES)(x))


def case(name, model, y, *needs, sizes=PACKED, x=IDS, fit={}, rows=2 * BATCH, **options):  # noqa: B006
    return Case(name, model, compiled(**options), x, y, fit, sizes, needs, rows)


def plain(**options):
    return {"metrics": [], "loss": crossentropy} | options


OTHER = _random.normal(size=(ROWS, 2))

REASON = "other weights, sizes and modes of packed rows"

CASES = supported([
    case("masked tokens, without metrics", tagger, LABELS, **plain()),
    case("token weights, which Keras divides by all elements", lambda: tagger(False), LABELS,
         fit={"sample_weight": WEIGHTS}, **plain(weighted_metrics=["accuracy"])),
    case("one label a row, a short last batch", classifier, ROW_LABELS, rows=ROWS),
    case("eagerly", tagger, LABELS, **plain(run_eagerly=True)),
])  # fmt: skip

FURTHER = supported([
    case("masked tokens", tagger, LABELS, "masked metrics"),
    case("token weights, divided by their sum", lambda: tagger(False), LABELS,
         fit={"sample_weight": WEIGHTS},
         **plain(loss=lambda: crossentropy(reduction="mean_with_sample_weight"))),
    case("several inputs", two_inputs, ROW_LABELS, x={"ids": IDS, "other": OTHER},
         sizes={"microbatch_tokens": 40, "lengths": lambda x: length_of(x["ids"])}),
    case("masked attention", attentive, LABELS, **plain()),
    case("masked tokens, adam", tagger, LABELS, **plain(optimizer="adam")),
    case("token weights, summed", lambda: tagger(False), LABELS,
         fit={"sample_weight": WEIGHTS},
         **plain(loss=lambda: crossentropy(reduction="sum"))),
    case("row weights", classifier, ROW_LABELS, fit={"sample_weight": _random.random(ROWS)}),
    case("all in one micro-batch", tagger, LABELS, sizes=PACKED | {"microbatch_tokens": 10**6},
         **plain()),
    case("one row a micro-batch", tagger, LABELS, sizes=PACKED | {"microbatch_tokens": TOKENS},
         **plain()),
    case("jit_compile", tagger, LABELS, "jit_compile", **plain(jit_compile=True)),
    case("steps_per_execution", tagger, LABELS, "steps_per_execution",
         **plain(steps_per_execution=2)),
])  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case)


def trained(model, x, y, **sizes):
    model.compile("sgd", crossentropy())
    vb.accumulate(model, **sizes)
    return model.train_on_batch(x, y, return_dict=True)


def test_masked_metrics_count_valid_tokens():
    keras.utils.set_random_seed(1)
    model = tagger()
    model.compile("sgd", crossentropy(), metrics=["accuracy"])
    vb.accumulate(model, **PACKED)
    right = keras.ops.convert_to_numpy(model(IDS)).argmax(-1) == LABELS
    found = model.train_on_batch(IDS, LABELS, return_dict=True)
    assert_close(found["accuracy"], right[MASK].mean(), 1e-6)


# Memory that runs out


class RunsOut(Model):
    """A tagger whose windows run out of memory where they are told to."""

    def __init__(self, points):
        super(Model, self).__init__()
        self.points = points
        self.first = layers.Embedding(WORDS, 4)
        self.norm = self.dropout = layers.Dropout(0.0)
        self.last = layers.Dense(CLASSES)


def test_memory_that_runs_out_halves_the_tokens(caplog):
    def trained(tokens, points):
        keras.utils.set_random_seed(1)
        model = RunsOut(points)
        # What runs out is outside the program, so none is needed.
        model.compile("adam", crossentropy(), weighted_metrics=["accuracy"], run_eagerly=True)
        vb.accumulate(model, microbatch_tokens=tokens, lengths=length_of)
        return model.fit(IDS, LABELS, sample_weight=WEIGHTS, shuffle=False, verbose=0).history

    with caplog.at_level(logging.WARNING, "virtualbatch"):
        found = trained(40, Points([0]))
    assert found == trained(20, Points())
    assert "Out of memory with micro-batches of 40 tokens." in caplog.text
    assert "micro-batches of 20 tokens, which are kept" in caplog.text


# Where packing is not safe


@pytest.mark.thorough("what docs/guides/packing.md warns of, for a second model")
def test_padding_that_reaches_valid_rows_is_another_model():
    def unmasked():
        """The mean over all words of a row, padding too."""
        return keras.Sequential(
            [
                keras.Input((None,), dtype="int32"),
                layers.Embedding(WORDS, 4),
                layers.GlobalAveragePooling1D(),
                layers.Dense(CLASSES),
            ]
        )

    with pytest.raises(AssertionError, match="off by"):
        assert_equals_keras(case("", unmasked, ROW_LABELS))


def test_a_loss_of_padding_is_another_loss():
    with pytest.raises(AssertionError, match="off by"):
        assert_equals_keras(case("", lambda: tagger(False), LABELS))


# Refusals


@pytest.mark.parametrize(
    ("sizes", "error", "text"),
    [
        ({"microbatch_tokens": 40}, ValueError, "microbatch_tokens and lengths belong together"),
        ({"lengths": length_of}, ValueError, "microbatch_tokens and lengths belong together"),
        (PACKED | {"microbatch_tokens": 0}, ValueError, "microbatch_tokens must be a positive"),
        (PACKED | {"lengths": "ids"}, TypeError, "lengths must be a function of the x of a batch"),
        (PACKED | {"microbatch_size": 4}, ValueError, "packed by tokens or cut by number"),
        (PACKED | {"accumulation_steps": 4}, ValueError, "packed by tokens or cut by number"),
    ],
)
def test_arguments_must_fit(sizes, error, text):
    model = tagger()
    model.compile("sgd", crossentropy())
    with pytest.raises(error, match=text):
        vb.accumulate(model, **sizes)


def test_a_model_of_one_length_is_refused():
    model = keras.Sequential(
        [keras.Input((TOKENS,), dtype="int32"), layers.Embedding(WORDS, 4), layers.Dense(CLASSES)]
    )
    with pytest.raises(ValueError, match=r"must take any length\. Got a model whose input has the"):
        trained(model, IDS, LABELS, **PACKED)


def test_what_may_be_padded_is_refused():
    series = np.ones((4, TOKENS, 3))
    model = keras.Sequential([keras.Input((None, 3)), layers.Dense(CLASSES)])
    with pytest.raises(ValueError, match=r"(?s)must be clear which leaves .* virtualbatch\.pack"):
        trained(model, series, LABELS[:4], microbatch_tokens=9, lengths=lambda x: x[:, 0, 0])


def test_lengths_that_are_not_one_per_row_are_refused():
    with pytest.raises(ValueError, match=r"one length per row"):
        trained(tagger(), IDS[:4], LABELS[:4], microbatch_tokens=9, lengths=lambda x: x)


def test_restore_takes_packing_back():
    model = tagger()
    trained(model, IDS, LABELS, **PACKED)
    vb.restore(model)
    assert "train_step" not in vars(model)
    model.fit(IDS, LABELS, verbose=0)
