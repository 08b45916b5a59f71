"""Whatever `fit` can read on every backend is cut alike."""

import keras
import pandas as pd
import pytest
from tests.keras import problems
from tests.keras.problems import X, compiled
from tests.keras.training import BATCH, ROWS, Case, assert_equals_keras, in_tiers

LABELS, WEIGHTS = problems.LABELS, problems.ROW_WEIGHTS


def batches():
    for start in range(0, 2 * BATCH, BATCH):
        rows = slice(start, start + BATCH)
        yield X[rows], LABELS[rows], WEIGHTS[rows]


def endless():
    while True:
        yield from batches()


class Pages(keras.utils.PyDataset):
    """The same batches by number."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return list(batches())[index]


REASON = "other containers of the same rows"

CASES = [
    Case("frames", problems.classifier, compiled(), pd.DataFrame(X), pd.Series(LABELS),
         {"sample_weight": pd.Series(WEIGHTS)}, rows=ROWS),
    Case("generator", problems.classifier, compiled(), endless, None, {"steps_per_epoch": 2}),
    Case("PyDataset", problems.classifier, compiled(), lambda: Pages()),
    Case("validation_data", problems.classifier, compiled(), X, LABELS,
         {"validation_data": (X[:40], LABELS[:40]), "validation_batch_size": 20,
          "validation_freq": 2}),
]  # fmt: skip

FURTHER = [
    Case("a frame of targets", problems.classifier, compiled(loss="mse", metrics=["mae"]),
         pd.DataFrame(X), pd.DataFrame(X[:, :3])),
    Case("validation_split", problems.classifier, compiled(), X, LABELS,
         {"validation_split": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case)


@pytest.mark.thorough("Keras shuffles before a batch is cut")
def test_shuffled_rows_equal_keras():
    case = Case("", problems.classifier, compiled(), X, LABELS, {"shuffle": True})
    assert_equals_keras(case)
