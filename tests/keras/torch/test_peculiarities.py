"""Where plain Keras on PyTorch raises, so do we; where it is wrong, we are right, and say so."""

import pytest
import torch
from tests.keras import problems
from tests.keras.problems import X, compiled, crossentropy
from tests.keras.training import Case, train
from tests.oracle import assert_close

import virtualbatch.keras as vb

LABELS = problems.LABELS


def test_a_loss_that_is_not_reduced_is_refused_as_pytorch_refuses_it():
    for accumulated in (False, True):
        loss = compiled(loss=lambda: crossentropy(reduction=None))
        case = Case("", problems.classifier, loss, X, LABELS)
        with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar"):
            train(case, accumulated)


def test_weights_narrower_than_the_mask_are_refused_as_keras_refuses_them():
    for accumulated in (False, True):
        case = Case("", problems.tagger, compiled(), problems.WORD_IDS, problems.TOKEN_LABELS,
                    {"sample_weight": problems.ROW_WEIGHTS[:, None]})  # fmt: skip
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            train(case, accumulated)


def test_weighted_metrics_count_the_mask_once():
    # Plain Keras multiplies them by the mask of the loss in place, before metrics read them.
    ids, labels = problems.WORD_IDS[:16], problems.TOKEN_LABELS[:16]
    weights = torch.tensor(problems.TOKEN_WEIGHTS[:16])
    model = problems.tagger()
    model.compile("sgd", crossentropy(), weighted_metrics=["accuracy"])
    vb.accumulate(model, microbatch_size=4)
    counts = problems.TOKEN_WEIGHTS[:16] * (ids != 0)
    right = model.predict(ids, verbose=0).argmax(-1) == labels
    found = model.train_on_batch(ids, labels, weights, return_dict=True)["accuracy"]
    assert_close(found, (right * counts).sum() / counts.sum())
