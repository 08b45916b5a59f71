"""BatchNorm statistics of a window: the moments of its micro-batches, merged into one update.

Each micro-batch is normalised with its own statistics, as on the replicas of data parallelism. But
the moving averages take one momentum update per window, with the moments of all its rows.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from virtualbatch.window.shares import Moments, merge_moments


def batchnorm_layers(model: keras.Model) -> list[Any]:
    """The BatchNormalization layers whose statistics can be merged, nested ones included.

    Layers with renormalisation are not listed. They read their moving statistics in the forward
    pass, so the update cannot wait for the end of the window.
    """
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and not layer.renorm
    ]


@contextmanager
def recorded_moments(layers: Sequence[Any]) -> Iterator[list[tuple[Any, Moments]]]:
    """Records the moments that the layers compute inside the context, in the order of their calls.

    Keras does not expose a layer's moments or the mask that was used for them. So for the length
    of one forward pass, an attribute of each layer replaces its method `_moments` and records.

    Yields:
        A list that fills with (layer, moments). The moments hold no graph. Their weight is a float
        if shapes are known, else a scalar. A layer that is called twice appears twice. A layer that
        is frozen or called with `training=False` does not appear.

    Raises:
        RuntimeError: another window records one of the layers, in this thread or another.
    """
    seen: list[tuple[Any, Moments]] = []

    def listener(layer: Any) -> Any:
        computed = type(layer)._moments

        def moments(inputs: Any, mask: Any) -> Any:
            mean, variance = computed(layer, inputs, mask)
            if mask is not None:
                weight = ops.sum(ops.cast(mask, mean.dtype))
            elif None not in inputs.shape:
                weight = math.prod(inputs.shape) / inputs.shape[layer.axis]
            else:
                values = ops.cast(ops.size(inputs), "float64") / inputs.shape[layer.axis]
                weight = ops.cast(values, mean.dtype)
            # A graph would keep each micro-batch's activations until the window ends.
            computed_moments = Moments(weight, ops.stop_gradient(mean), ops.stop_gradient(variance))
            seen.append((layer, computed_moments))
            return mean, variance

        return moments

    listening = []
    try:
        for layer in layers:
            moments = listener(layer)
            # setdefault is one atomic step, so only one of two threads can be first.
            if vars(layer).setdefault("_moments", moments) is not moments:
                raise RuntimeError(
                    "A BatchNormalization layer must be in one window at a time. "
                    f"Got {layer.name!r} inside a window that has not ended. "
                    "Train its models one after the other, or give each thread a model of its own."
                )
            listening.append(layer)
        yield seen
    finally:
        for layer in listening:
            del vars(layer)["_moments"]


def merged(a: Sequence[Moments], b: Sequence[Moments]) -> list[Moments]:
    """Merges the moments of two groups of rows, one layer call after the other."""
    return [
        merge_moments(Moments(*x), Moments(*y), divide=_divided) for x, y in zip(a, b, strict=True)
    ]


def _divided(a: Any, b: Any) -> Any:
    if isinstance(b, float):
        return a / (b or 1.0)
    return ops.divide_no_nan(a, b)


def moving_statistics(layers: Sequence[Any]) -> dict[int, tuple[Any, Any]]:
    """The moving mean and variance of each layer, by its id, at the start of the window."""
    return {
        id(layer): (ops.copy(layer.moving_mean), ops.copy(layer.moving_variance))
        for layer in layers
    }


def assign_statistics(
    layers: Sequence[Any], start: dict[int, tuple[Any, Any]], moments: Sequence[Moments]
) -> None:
    """Gives each layer one momentum update per call, from its values at the start of the window.

    Args:
        layers: one layer per recorded call, in the order of the calls.
        start: the result of `moving_statistics` at the start of the window.
        moments: the window's moments for each of those calls.
    """
    current = dict(start)
    for layer, (_, mean, variance) in zip(layers, moments, strict=True):
        moving_mean, moving_variance = current[id(layer)]
        keep, take = layer.momentum, 1.0 - layer.momentum
        current[id(layer)] = (
            moving_mean * keep + ops.cast(mean, moving_mean.dtype) * take,
            moving_variance * keep + ops.cast(variance, moving_variance.dtype) * take,
        )
        layer.moving_mean.assign(current[id(layer)][0])
        layer.moving_variance.assign(current[id(layer)][1])
