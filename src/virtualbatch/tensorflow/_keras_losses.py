"""Losses of Keras inside `strategy.run`: means over the rows that they get, as on one device."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

# Whoever has a loss of Keras has imported it; this engine does without.
_MODULE = "keras.src.losses.loss"
_DIVIDES = "scale_loss_for_distribution"


def traced_anew(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The loss without the `tf.function` around it, which may keep a trace from elsewhere."""
    if isinstance(loss_fn, tf.types.experimental.PolymorphicFunction):
        inner: Callable[..., Any] = loss_fn.python_function
        return inner
    return loss_fn


@contextmanager
def undivided() -> Iterator[None]:
    """While a loss is traced on one of several replicas, Keras does not divide it by their number.

    To Keras a batch is a mean of the replicas' means. The shares of a window sum to 1 over all
    replicas already. Keras asks the strategy, which cannot be another one here: variables that a
    loss writes belong to it. No other replica is traced meanwhile, as nothing waits for one here.

    Raises:
        ValueError: a `tf.function` inside of the loss has a loss of Keras.
    """
    losses = sys.modules.get(_MODULE)
    if losses is None:
        yield
        return
    here, own = tf.compat.v1.get_default_graph(), vars(losses)[_DIVIDES]

    def as_it_is(value: Any) -> Any:
        graph = tf.compat.v1.get_default_graph()
        while graph is not here:
            # Branches and loops are other classes; only a tf.function keeps its graph for others.
            if graph.__class__.__name__ == "FuncGraph":
                raise ValueError(
                    "On several replicas a loss of Keras must not be in a tf.function of its own: "
                    "other calls would reuse that function, although Keras divides their loss by "
                    f"the number of replicas. Got one in {graph.name}. Leave that tf.function out."
                )
            graph = graph.outer_graph
        return value

    setattr(losses, _DIVIDES, as_it_is)
    try:
        yield
    finally:
        setattr(losses, _DIVIDES, own)
