"""The contenders of a comparison: ways to make the updates of a batch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OURS, PEER, FLOOR, WHOLE = "ours", "peer", "floor", "whole"
VIRTUALBATCH, WHOLE_BATCH = "virtualbatch", "whole batch at once"
ALL_PEERS, NO_PEERS, LIST_PEERS = "all", "none", "list"


@dataclass(frozen=True)
class Contender:
    """One way to make updates.

    Args:
        name: the name of this way.
        role: `OURS`, `PEER`, `FLOOR` (only forward and backward of the micro-batches and one
            update; its weights are not compared) or `WHOLE` (the uncut batch).
        train: number of updates -> seconds of one update. Makes that many updates on the batch.
        weights: () -> the model's current weights, in an order that all contenders share.
    """

    name: str
    role: str
    train: Callable[[int], float]
    weights: Callable[[], Sequence[np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class Absent:
    """A peer whose package is not installed."""

    name: str
    package: str


def looped(update: Callable[[], Any], wait: Callable[[Any], Any]) -> Callable[[int], float]:
    """A `train` function that repeats one update.

    Args:
        update: makes an update and returns a result of it.
        wait: waits until such a result is computed.
    """

    def train(updates: int) -> float:
        start = time.perf_counter()
        for _ in range(updates):
            found = update()
        wait(found)
        return (time.perf_counter() - start) / updates

    return train
