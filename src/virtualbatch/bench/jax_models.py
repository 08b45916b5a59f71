"""The models of a comparison in JAX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from virtualbatch.bench.case import CLASSES, EPSILON, RATE, SHARPNESS, WORDS, Case

_Model = tuple[Any, Callable[[Any, Any], Any]]


def _dense(random: np.random.Generator, *sizes: int) -> dict[str, jax.Array]:
    return {"w": _kernel(random, *sizes), "b": jnp.zeros(sizes[-1])}


def _kernel(random: np.random.Generator, *sizes: int) -> jax.Array:
    return jnp.asarray(random.normal(size=sizes) / np.sqrt(np.prod(sizes[:-1])), jnp.float32)


def _applied(layer: Any, x: Any) -> Any:
    return x @ layer["w"] + layer["b"]


def _mlp(random: np.random.Generator, width: int) -> _Model:
    params = [_dense(random, 64, width), _dense(random, width, width)]
    params.append(_dense(random, width, CLASSES))

    def logits(params: Any, x: Any) -> Any:
        for layer in params[:-1]:
            x = jax.nn.relu(_applied(layer, x))
        return _applied(params[-1], x)

    return params, logits


def _cnn(random: np.random.Generator, width: int) -> _Model:
    sizes = [(3, 3, 1, width), (3, 3, width, 2 * width), (3, 3, 2 * width, 2 * width)]
    params = {
        "kernels": [_kernel(random, *size) for size in sizes],
        "head": _dense(random, 36 * 2 * width, CLASSES),
    }

    def convolved(x: Any, kernel: Any, padding: str) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        found = lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)
        return jax.nn.relu(found)

    def logits(params: Any, x: Any) -> Any:
        first, second, third = params["kernels"]
        x = convolved(convolved(x, first, "SAME"), second, "SAME")
        x = x.reshape(len(x), 8, 2, 8, 2, -1).max((2, 4))
        x = convolved(x, third, "VALID")
        return _applied(params["head"], x.reshape(len(x), -1))

    return params, logits


def _transformer(random: np.random.Generator, width: int) -> _Model:
    blocks = [
        {name: _dense(random, width, width) for name in ("q", "k", "v", "o")}
        | {"up": _dense(random, width, 4 * width), "down": _dense(random, 4 * width, width)}
        for _ in range(2)
    ]
    params = {"blocks": blocks, "head": _dense(random, width, CLASSES)}

    def logits(params: Any, x: Any) -> Any:
        for block in params["blocks"]:
            q, k, v = (_applied(block[name], x).reshape(*x.shape[:2], 4, -1) for name in "qkv")
            seen = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
            x = x + _applied(block["o"], seen)
            x = x + _applied(block["down"], jax.nn.gelu(_applied(block["up"], x)))
        return _applied(params["head"], x.mean(1))

    return params, logits


def _tokens(random: np.random.Generator, width: int) -> _Model:
    params = {
        "words": _kernel(random, WORDS, width),
        "up": _dense(random, width, 4 * width),
        "head": _dense(random, 4 * width, CLASSES),
    }

    def logits(params: Any, x: Any) -> Any:
        x = jax.nn.relu(_applied(params["up"], params["words"][x]))
        return _applied(params["head"], x)

    return params, logits


_MODELS = {
    "MLP": _mlp,
    "CNN": _cnn,
    "transformer": _transformer,
    "tokens": _tokens,
    "pairs": _transformer,
}


class Problem(NamedTuple):
    """A model's parameters, a batch and the loss.

    Fields:
        params: the parameters.
        optimizer: the optimizer of the parameters.
        batch: inputs and classes.
        loss: (params, batch) -> mean loss of the batch.
        weight: batch -> what its mean loss was divided by; None for the number of rows.
        logits: (params, inputs) -> the outputs from which the loss is computed.
    """

    params: Any
    optimizer: optax.GradientTransformation
    batch: tuple[jax.Array, jax.Array]
    loss: Callable[[Any, Any], Any]
    weight: Callable[[Any], Any] | None
    logits: Callable[[Any, Any], Any]


def problem(case: Case) -> Problem:
    """The problem of a case. Every call gives the same parameters."""
    params, logits = _MODELS[case.model](np.random.default_rng(0), case.width)
    x, y = map(jnp.asarray, case.batch())
    optimizer = optax.adam(RATE, eps=EPSILON)
    if case.model == "pairs":
        return Problem(params, optimizer, (x, y), contrastive_loss(logits), None, logits)
    tokens = case.model == "tokens"

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
        return (losses * (x != 0)).sum() / (x != 0).sum() if tokens else losses.mean()

    return Problem(params, optimizer, (x, y), loss, valid_tokens if tokens else None, logits)


def contrastive_loss(encode: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """(params, two views) -> the mean loss of each row's first view against all second views."""

    def loss(params: Any, batch: Any) -> Any:
        first, second = (
            z / jnp.linalg.norm(z, axis=1, keepdims=True)
            for z in (encode(params, view) for view in batch)
        )
        logits = SHARPNESS * first @ second.T
        rows = jnp.arange(len(logits))
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows).mean()

    return loss


def valid_tokens(batch: Any) -> Any:
    """The number of tokens of a batch that are not padding."""
    return (batch[0] != 0).sum()
