"""Refuses what cannot be trained by windows on the replicas of a strategy."""

import keras
import tensorflow as tf

from virtualbatch.keras._checks import named_strategy, replica_count
from virtualbatch.keras._overwritten import are_overwritten


def refuse_replicas(model: keras.Model) -> None:
    """Refuses models that replicas cannot train exactly, or that would make them wait for ever.

    Raises:
        ValueError: the strategy's replicas do not train in step; the model was not built in the
            strategy's scope; the model runs eagerly; or a layer waits for other replicas, or has
            values that are not summed over replicas.
    """
    strategy = model.distribute_strategy
    if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
        raise ValueError(
            f"Replicas must train in step. Got {type(strategy).__name__}. Use MirroredStrategy."
        )
    if replica_count(model) == 1:
        return
    if model._distribute_strategy is None:
        raise ValueError(
            "A model must be built and compiled in the scope of the strategy that trains it. "
            f"Got a model of no strategy in the scope of {named_strategy(model)}. "
            "Build and compile it inside of strategy.scope(), or call fit outside of it."
        )
    if model.run_eagerly:
        raise ValueError(
            "Several replicas must be trained in a graph. Got run_eagerly=True in "
            f"{named_strategy(model)}. Compile without it."
        )
    layers = list(model._flatten_layers())
    waiting = [layer.name for layer in layers if getattr(layer, "synchronized", False)]
    if waiting:
        raise ValueError(
            "A layer must not wait for other replicas in each micro-batch, because they may run "
            f"more or fewer micro-batches. Got synchronized=True in {', '.join(waiting)}. Leave "
            "it out: moving averages are those of all rows, with and without it."
        )
    if any(are_overwritten(model.trainable_variables)):
        raise ValueError(
            "Values that a layer sets in its backward pass are not summed over replicas. Got "
            f"float8 layers in {named_strategy(model)}. Train them on one device."
        )
