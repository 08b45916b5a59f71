"""What is said of the first batch, where its cut looks like another meaning of `batch_size`."""

import pytest
from tests.keras import problems
from tests.keras.problems import LABELS, X, crossentropy

import virtualbatch.keras as vb

NOTHING = (
    "A batch of 16 rows is one micro-batch of microbatch_size=16, so nothing is accumulated. "
    "One batch of fit is one update: did you mean fit(batch_size=64)?"
)
SLICES = (
    "A batch of 16 rows is one update of 6 micro-batches of up to 3 rows. If all 16 rows fit in "
    "memory at once, did you mean fit(batch_size=96)? Otherwise pass microbatch_size=3 instead "
    "of accumulation_steps=6, which also stops this message."
)


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "virtualbatch"]


def accumulating(**sizes):
    model = problems.classifier()
    model.compile("sgd", crossentropy(), run_eagerly=True)
    vb.accumulate(model, **sizes)
    return model


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"microbatch_size": 16}, [NOTHING]),
        ({"accumulation_steps": 6}, [SLICES]),
        ({"microbatch_size": 15}, []),
        ({"microbatch_size": 3, "accumulation_steps": 6}, []),
        ({"microbatch_size": 16, "accumulation_steps": 1}, []),
        ({"accumulation_steps": 1}, []),
    ],
)
def test_it_is_said_once_where_it_looks_like_a_mistake(sizes, expected, caplog):
    model = accumulating(**sizes)
    # The second batch is short, and so of another shape.
    model.fit(X[:20], LABELS[:20], batch_size=16, epochs=2, verbose=0)
    assert said(caplog) == expected


def test_it_is_said_again_after_another_call(caplog):
    model = accumulating(microbatch_size=16)
    model.train_on_batch(X[:16], LABELS[:16])
    vb.accumulate(model, microbatch_size=16)
    model.train_on_batch(X[:16], LABELS[:16])
    assert said(caplog) == [NOTHING, NOTHING]
