"""Packed rows on two replicas, each of which packs its own: `fit` trains as one device does."""

import keras
import numpy as np
import pytest
from tests.keras.packing import IDS, LABELS, PACKED, WEIGHTS, length_of, tagger
from tests.keras.problems import compiled, crossentropy
from tests.keras.tensorflow.replicas import case, on_replicas, strategy
from tests.keras.test_gather import neighbours, rows_of_words
from tests.keras.training import assert_same_run, eagerly, train

import virtualbatch.keras as vb

SLOW = "each traces a model twice for each of two replicas"
# A word at which lengths are wrong.
BAD = 1
# Few enough that each replica has several micro-batches.
PACKED_ON_REPLICAS = PACKED | {"microbatch_tokens": 16}
WEIGHED = case(
    "masked tokens with weights",
    tagger,
    compiled(weighted_metrics=lambda: ["accuracy"]),
    IDS,
    LABELS,
    {"sample_weight": WEIGHTS, "epochs": 1},
    sizes=PACKED_ON_REPLICAS,
)
UNMASKED = case(
    "unmasked tokens, padding without weight",
    lambda: tagger(mask_zero=False),
    compiled(metrics=lambda: []),
    IDS,
    LABELS,
    {"sample_weight": WEIGHTS, "epochs": 1},
    sizes=PACKED_ON_REPLICAS,
)
COUPLED = case(
    "a loss of all rows",
    rows_of_words,
    compiled(loss=lambda: [crossentropy(), neighbours], metrics=lambda: [[], ["mae"]]),
    IDS,
    [IDS % 3, np.random.default_rng(2).normal(size=(len(IDS), 16))],
    sizes=PACKED_ON_REPLICAS,
    # Two in the last batch: one row has no neighbour.
    rows=18,
)


@pytest.mark.thorough(SLOW)
@pytest.mark.parametrize("case", [WEIGHED, UNMASKED, COUPLED], ids=lambda case: case.name)
def test_equals_one_device(case):
    # In a graph, Keras weighs batches of several losses alike where rows are open.
    expected = train(case if case is COUPLED else eagerly(case), accumulated=False)
    assert_same_run(on_replicas(case), expected)


@pytest.mark.thorough(SLOW)
def test_lengths_that_do_not_fit_on_one_replica_are_refused():
    with strategy().scope():
        model = tagger()
        model.compile("sgd", crossentropy())
    vb.accumulate(
        model,
        microbatch_tokens=16,
        lengths=lambda ids: length_of(ids) + 99 * keras.ops.cast(ids[:, 0] == BAD, "int32"),
    )
    ids = np.where(IDS[:16] == BAD, BAD + 1, IDS[:16])
    ids[9, 0] = BAD
    with pytest.raises(ValueError, match=r"length.*exceed the padded axis"):
        model.fit(ids, LABELS[:16], batch_size=16, verbose=0)
