"""Weights of a window, computed before its first forward pass, and the shares made of them.

Without jit, the weights of all micro-batches are copied to the host at once and checked there.
Under a trace they stay on the device and are not read.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from virtualbatch.jax._segment import Cut
from virtualbatch.window.shares import Shares, row_weights, shares
from virtualbatch.window.terms import GivenWeight, WeightFunction
from virtualbatch.window.weights import host_shares


def window_shares(cut: Cut, weight: GivenWeight) -> Shares:
    """Shares of a window whose values can be read.

    Args:
        cut: the window.
        weight: as for `host_shares`.

    Raises:
        ValueError: a weight is not valid, as in `host_shares`.
    """
    return host_shares(cut.rows, weight, cut.microbatches(), jax.device_get)


def traced_shares(cut: Cut, weight: GivenWeight, axis_name: Any) -> Shares:
    """Shares of a window inside a trace.

    Args:
        cut: the window.
        weight: as for `host_shares`.
        axis_name: mesh axes over which the batch is spread, or None. The total includes the weights
            of all their devices.

    Returns:
        The shares. Shares by weights are formed in float32 or wider. A weight of 0 has the share 0.
        Any other weight is divided by the total, even if the result is NaN.

    Raises:
        ValueError: a weight is not a scalar, or names differ between micro-batches.
    """
    replicas = 1 if axis_name is None else lax.axis_size(axis_name)
    rows = np.asarray(shares(row_weights(cut.rows))) / replicas
    window: Any = None if None in cut.rows else sum(cut.rows) * replicas
    ones = np.ones_like(rows)
    if not callable(weight):
        return Shares(rows, None, frozenset(), window, rows if weight is None else ones)
    checked = WeightFunction(weight)

    def one(microbatch: Any) -> list[Any]:
        return [_wide(value) for value in checked.values(microbatch)]

    pieces = []
    for segment in cut.segments:
        if segment.count == 1:
            pieces.append([value[None] for value in one(segment.get(0))])
        else:
            index = jnp.arange(segment.count)
            pieces.append(lax.map(lambda i, segment=segment: one(segment.get(i)), index))
    vectors = []
    for column in zip(*pieces, strict=True):
        weights = jnp.concatenate(column)
        total = jnp.sum(weights)
        total = total if axis_name is None else lax.psum(total, axis_name)
        vectors.append(_divided(weights, total))
    terms = checked.by_name(vectors, rows, ones)
    if window is None and len(terms) == len(vectors) == 1:
        window = total
    return Shares(rows, terms, checked.certain, window, rows)


def groups(shares: Shares) -> list[list[Any] | None]:
    """Groups of terms that are differentiated together, as lists of names; None for all terms.

    A term that can be empty is a group of its own: its gradient may be NaN and must be left out.
    All other terms with the same shares are one group.
    """
    if shares.terms is None:
        return [None]
    together: dict[int, list[Any]] = {}
    for name in shares.terms:
        if name in shares.certain:
            together.setdefault(id(shares.terms[name]), []).append(name)
    alone: list[list[Any] | None] = [[n] for n in shares.terms if n not in shares.certain]
    # Without any name the loss must still run, so that its own names can be refused.
    return [*together.values(), *alone] or [None]


def scaled(value: Any, shares: Shares, names: list[Any] | None, index: Any) -> Any:
    """A micro-batch's loss and gradients, in the dtype of the sums, times their share.

    Args:
        value: the loss and gradients, a pytree of arrays.
        shares: the shares of the window.
        names: their group of terms, as `groups` gives it.
        index: the number of the micro-batch.
    """
    vector, may_be_empty = shares.unnamed, False
    if shares.terms is not None and names is not None:
        vector, may_be_empty = shares.terms[names[0]], names[0] not in shares.certain
    share = jnp.asarray(vector)[index]

    def times(x: Any) -> Any:
        product = x * share.astype(x.dtype)
        # 0 times NaN is NaN.
        return jnp.where(share == 0, 0, product) if may_be_empty else product

    return jax.tree.map(times, value)


def part(shares: Shares, index: int) -> tuple[list[Any] | None, dict[Any, float], float] | None:
    """The terms of a micro-batch to differentiate, if shares can be read.

    Returns:
        (names, factors, largest). Names are the terms that are not empty; None for all terms.
        Factors are the ratios of shares to the largest share, without ratios of 1. Largest is the
        largest share. None instead of the tuple if all terms are empty.
    """
    if shares.terms is None:
        return None, {}, float(shares.unnamed[index])
    if shares.is_empty(index):
        return None
    parts = {name: found[index] for name, found in shares.terms.items() if found[index]}
    # Half precision would round a share in the backward pass, so only the ratio goes through it.
    largest = max(parts.values())
    return list(parts), {n: x / largest for n, x in parts.items() if x != largest}, largest


def _divided(weights: Any, total: Any) -> Any:
    # With an infinite total, finite weights would get the share 0 and be silently dropped. So the
    # total becomes NaN.
    total = jnp.where(jnp.isinf(total), total - total, total)
    # 0 divided by a total of 0 is NaN, and `jax_debug_nans` would raise an error.
    return weights / jnp.where(weights == 0, 1, total)


def _wide(value: Any) -> Any:
    value = jnp.asarray(value)
    # float64 if x64 is enabled: a count of tokens may need more bits than float32 has.
    return value.astype(jax.dtypes.canonicalize_dtype(np.float64))
