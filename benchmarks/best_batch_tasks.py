"""Three small tasks for `best_batch.py`: digits, text, regression."""

import pydoc_data.topics
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Task(NamedTuple):
    """What is trained.

    Fields:
        x: inputs, one row each.
        y: targets, one row each.
        start: key -> parameters.
        loss: (parameters, (x, y)) -> mean loss.
        target: loss on all data at which training has arrived.
        rate: a learning rate at which windows of 64 rows train.
    """

    x: Any
    y: Any
    start: Callable[[Any], Any]
    loss: Callable[[Any, Any], Any]
    target: float
    rate: float


def digits() -> Task:
    """Ten classes of images of 64 pixels, by two dense layers."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)

    def start(key: Any) -> Any:
        return dense(key, [64, 32, 10])

    return Task(jnp.asarray(x / 16, jnp.float32), jnp.asarray(y), start, crossentropy, 0.2, 0.5)


def text() -> Task:
    """The next letter after eight, in Python's own help texts."""
    letters = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode()[:6_000], "uint8")
    known, ids = np.unique(letters, return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(ids, 9)[::5]
    width = 8

    def start(key: Any) -> Any:
        first, second = jax.random.split(key)
        table = jax.random.normal(first, (len(known), width)) / 2
        return table, dense(second, [8 * width, 32, len(known)])

    def loss(params: Any, batch: Any) -> Any:
        table, layers = params
        x, y = batch
        return crossentropy(layers, (table[x].reshape(len(x), -1), y))

    return Task(jnp.asarray(windows[:, :8]), jnp.asarray(windows[:, 8]), start, loss, 2.2, 0.5)


def regression() -> Task:
    """A noisy function of 20 numbers of unequal size, by a linear model."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4096, 20)) / np.arange(1, 21) ** 0.5
    y = x @ rng.normal(size=20) + rng.normal(size=4096)

    def start(key: Any) -> Any:
        return jnp.zeros(20)

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        return jnp.mean(jnp.square(x @ params - y)) / 2

    return Task(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), start, loss, 0.52, 0.1)


def dense(key: Any, widths: list[int]) -> Any:
    """Weights and biases of dense layers."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        (jax.random.normal(k, pair) / pair[0] ** 0.5, jnp.zeros(pair[1]))
        for k, pair in zip(keys, pairwise(widths), strict=True)
    ]


def crossentropy(layers: Any, batch: Any) -> Any:
    """Mean cross-entropy of dense layers with tanh between them."""
    x, y = batch
    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight + bias)
    weight, bias = layers[-1]
    logits = jax.nn.log_softmax(x @ weight + bias)
    return -jnp.take_along_axis(logits, y[:, None], 1).mean()


TASKS = {"digits": digits, "text": text, "regression": regression}
