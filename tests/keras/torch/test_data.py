"""What `fit` and `train_on_batch` read on PyTorch is cut alike."""

import keras
import pytest
import torch
from tests.keras import problems
from tests.keras.problems import X, compiled
from tests.keras.training import BATCH, Case, assert_equals_keras, assert_same_values

import virtualbatch.keras as vb

LABELS, WEIGHTS = problems.LABELS, problems.ROW_WEIGHTS
TENSORS = [torch.tensor(array) for array in (X, LABELS, WEIGHTS)]


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*TENSORS), batch_size=BATCH)


def listed():
    """Batches as lists, which a collate function of one's own may make."""
    return torch.utils.data.DataLoader(
        [(x, {"label": y}) for x, y in zip(*TENSORS[:2], strict=True)],
        batch_size=BATCH,
        collate_fn=lambda rows: [
            torch.stack([x for x, _ in rows]),
            torch.stack([y["label"] for _, y in rows]),
        ],
    )


CASES = [
    Case("tensors", problems.classifier, compiled(), *TENSORS[:2],
         {"sample_weight": TENSORS[2], "batch_size": BATCH}),
    Case("DataLoader", problems.classifier, compiled(), loader),
    Case("DataLoader of lists", problems.classifier, compiled(), listed),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_keras(case):
    assert_equals_keras(case)


BATCHES = {
    "tensors": tuple(TENSORS),
    "arrays": (X, LABELS, WEIGHTS),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_train_on_batch_equals_keras(batch):
    logs = []
    for accumulates in (False, True):
        keras.utils.set_random_seed(1)
        model = problems.classifier()
        model.compile(**compiled(weighted_metrics=["accuracy"])())
        if accumulates:
            vb.accumulate(model, microbatch_size=16)
        x, y, sample_weight = batch
        for _ in range(2):
            found = model.train_on_batch(x, y, sample_weight, return_dict=True)
        logs.append(found)
    assert_same_values(logs[1], logs[0])


def test_no_data_is_refused_as_keras_refuses_it():
    for accumulates in (False, True):
        model = problems.classifier()
        model.compile(**compiled()())
        if accumulates:
            vb.accumulate(model, microbatch_size=16)
        with pytest.raises(ValueError, match="num_samples should be a positive integer"):
            model.fit(X[:0], LABELS[:0], verbose=0)
