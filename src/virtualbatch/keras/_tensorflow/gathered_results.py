"""What each pass of a window whose losses see all rows gives to the next, on TensorFlow."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Forwards(NamedTuple):
    """The results of the first pass.

    Fields:
        moments: BatchNorm moments, in the order of the layers' calls.
        added: losses that layers have added.
        counts: a list with the weights vector; empty if nothing is counted.
        arrays: gathered predictions and their masks, in the order of the batch.
        batch: (x, y, sample_weight) of the same rows.
        told: the table of micro-batches for the logs; see `LOSSES`.
    """

    moments: list[Any]
    added: list[Any]
    counts: list[Any]
    arrays: list[Any]
    batch: Any
    told: Any


class Backwards(NamedTuple):
    """The results of the second pass.

    Fields:
        losses: the losses that do not see all rows: their sum and per-output values; may be empty.
        dense: dense gradients, or None.
        latest: see `virtualbatch.keras._tensorflow.window.Micro`.
        sparse: values and indices of sparse gradients.
        own: see `OfAllRows`.
    """

    losses: list[Any]
    dense: list[Any]
    latest: Any
    sparse: list[Any]
    own: Sequence[Any]


class OfAllRows(NamedTuple):
    """The results of the loss of all rows.

    Fields:
        losses: the loss and per-output losses.
        predictions: gradient of each gathered prediction, or None.
        added: gradient of each loss that layers have added, or None.
        own: gradient of each trainable variable that the loss itself uses, or None.
        latest: results of an overridden `compute_metrics`; else empty.
    """

    losses: list[Any]
    predictions: list[Any]
    added: list[Any]
    own: list[Any]
    latest: Any
