"""What Keras does with several losses, or with one that is not reduced, on TensorFlow only."""

import numpy as np
import pytest
import tensorflow as tf
from tests.keras import problems
from tests.keras.problems import X, compiled, crossentropy
from tests.keras.test_outputs import by_name, losses, two_in_a_dict
from tests.keras.training import BATCH, Case, assert_equals_keras, in_tiers, train


def rows_known():
    rows = tf.data.Dataset.from_tensor_slices((X, {"a": problems.LABELS, "b": problems.TARGETS}))
    return rows.batch(BATCH, drop_remainder=True)


# Where a trace knows the rows, Keras weights the losses per output by them in History.
REASON = "the quick case, run eagerly"

CASES = [
    Case("rows known when traced", two_in_a_dict,
         compiled(loss=lambda: by_name(losses()), metrics=None), rows_known),
]  # fmt: skip

FURTHER = [
    Case("rows known when run eagerly", two_in_a_dict,
         compiled(loss=lambda: by_name(losses()), metrics=None, run_eagerly=True), rows_known),
]  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case)


@pytest.mark.thorough("test_losses.py compares both reductions with plain Keras")
def test_the_suggested_sum_has_the_same_gradient():
    weights = []
    for reduction in (None, "sum"):
        arguments = {"optimizer": "sgd", "loss": crossentropy(reduction=reduction)}
        case = Case("", problems.classifier, arguments.copy, X, problems.LABELS)
        weights.append(train(case, accumulated=True).model.get_weights())
    for unreduced, summed in zip(*weights, strict=True):
        np.testing.assert_allclose(unreduced, summed, rtol=1e-12)
