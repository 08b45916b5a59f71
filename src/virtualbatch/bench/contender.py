"""Who takes part in a comparison: a way of making the updates of a batch."""

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
    """One way of making updates.

    Args:
        name: of the way.
        role: `OURS`, `PEER`, `FLOOR` (forward and backward of the micro-batches and one update,
            and nothing else; what it trains is not compared) or `WHOLE`, the uncut batch.
        train: makes so many updates on the batch; returns the seconds that one took.
        weights: the model's weights now, in an order that all contenders share.
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
    """A `train` from one update.

    Args:
        update: makes an update and returns something that depends on it.
        wait: returns once that something is there.
    """

    def train(updates: int) -> float:
        start = time.perf_counter()
        for _ in range(updates):
            found = update()
        wait(found)
        return (time.perf_counter() - start) / updates

    return train
