"""Metrics see every row of every batch once, as plain Keras' do."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras import problems
from tests.keras.backends import supported
from tests.keras.problems import FEATURES, X, compiled
from tests.keras.training import ROWS, Case, assert_equals_keras, in_tiers

metrics = keras.metrics
POSITIVE = (problems.LABELS > 0)[:, None].astype("float64")
# Few bits each: on PyTorch Keras' AUC adds in float32, which is then exact too.
WEIGHTS = {"sample_weight": np.round(problems.ROW_WEIGHTS * 64) / 64}


def probability():
    return keras.Sequential([keras.Input((FEATURES,)), layers.Dense(1, activation="sigmoid")])


def stateful():
    """Metrics that keep counts per threshold, sums of squares and so on."""
    return [
        metrics.AUC(num_thresholds=20),
        metrics.Precision(),
        metrics.Recall(),
        metrics.F1Score(),
        metrics.R2Score(),
        metrics.RootMeanSquaredError(),
        metrics.SensitivityAtSpecificity(0.5, num_thresholds=20),
        metrics.BinaryCrossentropy(),
    ]


class Logits(metrics.Metric):
    """A metric of the user's own: the confusion matrix that MeanIoU keeps, from logits."""

    def __init__(self):
        super().__init__(name="mean_iou")
        self.iou = metrics.MeanIoU(3, sparse_y_pred=False)

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.iou.update_state(y_true, y_pred, sample_weight)

    def reset_state(self):
        self.iou.reset_state()

    def result(self):
        return self.iou.result()


def per_row(y_true, y_pred):
    """A metric function with one value per row."""
    return ops.max(y_pred, -1)


def functions():
    return [Logits(), per_row, metrics.SparseCategoricalAccuracy("again")]


class Watching(layers.Layer):
    """Keeps a metric of its own."""

    def __init__(self):
        super().__init__()
        self.size = metrics.Mean(name="size")

    def call(self, inputs):
        self.size.update_state(ops.mean(ops.square(inputs), -1))
        return inputs


def watched():
    return keras.Sequential(
        [keras.Input((FEATURES,)), layers.Dense(4), Watching(), layers.Dense(3)]
    )


class OwnMetrics(keras.Model):
    """Reports a metric of its own, and a number that is none: what the last micro-batch gave."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3)
        self.spread = metrics.Mean(name="spread")

    def call(self, inputs):
        return self.out(inputs)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.spread.update_state(ops.max(y_pred, -1) - ops.min(y_pred, -1))
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        return results | {"seven": 7.0 + ops.zeros((), "float64")}


REASON = "the quick case, run eagerly"

CASES = supported([
    Case("stateful, weighted too", probability,
         compiled(loss="binary_crossentropy", metrics=stateful, weighted_metrics=stateful),
         X, POSITIVE, WEIGHTS, rows=ROWS),
    Case("MeanIoU, functions", problems.classifier,
         compiled(metrics=functions, weighted_metrics=lambda: ["accuracy"]),
         X, problems.LABELS, WEIGHTS),
    Case("masked, weighted", problems.tagger,
         compiled(weighted_metrics=["accuracy"]), problems.WORD_IDS, problems.TOKEN_LABELS,
         {"sample_weight": problems.TOKEN_WEIGHTS}, needs=("masked weights in metrics",)),
    Case("of a layer", watched, compiled(), X, problems.LABELS, needs=("metrics in layers",)),
    Case("own compute_metrics", OwnMetrics, compiled(), X, problems.LABELS),
])  # fmt: skip

FURTHER = supported([
    Case("own compute_metrics, eager", OwnMetrics, compiled(run_eagerly=True), X, problems.LABELS),
])  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(CASES, FURTHER, REASON))
def test_equals_keras(case):
    assert_equals_keras(case)
