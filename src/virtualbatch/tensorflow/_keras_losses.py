"""Losses of Keras inside `strategy.run`: means over the rows that they get, as on one device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Whoever has a loss of Keras has imported it; this engine does without.
_MODULE = "keras.src.losses.loss"
_DIVIDES = "scale_loss_for_distribution"


@contextmanager
def undivided() -> Iterator[None]:
    """While a loss is traced on one of several replicas, Keras does not divide it by their number.

    To Keras a batch is a mean of the replicas' means. The shares of a window sum to 1 over all
    replicas already. Keras asks the strategy, which cannot be another one here: variables that a
    loss writes belong to it. No other replica is traced meanwhile, as nothing waits for one here.
    """
    losses = sys.modules.get(_MODULE)
    if losses is None:
        yield
        return
    own = vars(losses)[_DIVIDES]
    setattr(losses, _DIVIDES, lambda value: value)
    try:
        yield
    finally:
        setattr(losses, _DIVIDES, own)
