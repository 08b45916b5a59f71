"""Losses of Keras inside `strategy.run`: means over the rows that they get, as on one device."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

# A program with a loss of Keras has imported this module. The engine itself does not import it.
_MODULE = "keras.src.losses.loss"
_DIVIDES = "scale_loss_for_distribution"


def traced_anew(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The loss without the `tf.function` around it, which may have a trace from another place."""
    if isinstance(loss_fn, tf.types.experimental.PolymorphicFunction):
        inner: Callable[..., Any] = loss_fn.python_function
        return inner
    return loss_fn


@contextmanager
def undivided() -> Iterator[None]:
    """Inside the context, Keras does not divide a loss by the number of replicas.

    It is for the trace of a loss on one of several replicas. For Keras, the loss of a batch is the
    mean of the replicas' means. But here the shares of a window already sum to 1 over all replicas.

    Keras reads the number from the strategy. The strategy cannot be replaced here, because the
    variables that a loss writes belong to it. So a function of Keras is replaced. No other replica
    is traced at the same time, because nothing in the context waits for another replica.

    Raises:
        ValueError: a `tf.function` inside the loss has a loss of Keras.
    """
    losses = sys.modules.get(_MODULE)
    if losses is None:
        yield
        return
    here, own = tf.compat.v1.get_default_graph(), vars(losses)[_DIVIDES]

    def as_it_is(value: Any) -> Any:
        graph = tf.compat.v1.get_default_graph()
        while graph is not here:
            # Graphs of branches and loops have other classes. Only a tf.function keeps its graph
            # for other calls.
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
