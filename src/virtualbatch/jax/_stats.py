"""Statistics of a window's gradient noise: the squared norm of each gradient."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.window.shares import Shares


def part_of(gradients: Any, share: Any) -> Any:
    """A micro-batch's part of the window's `mean_square`.

    Args:
        gradients: the micro-batch's share of the gradients, in the dtype of the sums.
        share: the share, a scalar; 0 if the micro-batch counts for nothing.

    Returns:
        Share times squared norm of the micro-batch's own gradient; a scalar.
    """
    total = squared_norm(gradients)
    share = jnp.asarray(share, total.dtype)
    # If the share is 0, the gradients are 0 too. Any other share is divided by, even NaN.
    return total / jnp.where(share == 0, 1, share)


def stats_of(gradients: Any, shares: Shares, mean_square: Any, axis_name: Any) -> WindowStats:
    """The statistics of a window, of all devices if it is spread over an axis.

    Args:
        gradients: the gradients of the window.
        shares: the shares of the window.
        mean_square: the sum of `part_of` over micro-batches and devices.
        axis_name: mesh axes over which the batch is spread, or None.
    """
    counted = jnp.sum(jnp.asarray(shares.of_rows_or_term()) != 0)
    if axis_name is not None:
        counted = lax.psum(counted, axis_name)
    return WindowStats(shares.window, counted, mean_square, squared_norm(gradients))


def squared_norm(gradients: Any) -> Any:
    """Sum of squares of all entries, in float32 or wider."""
    squares = [_squared(x) for x in jax.tree.leaves(gradients)]
    return sum(squares, jnp.zeros((), jnp.float32))


def _squared(x: Any) -> Any:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.square(jnp.abs(wide))
    # Axis by axis: XLA on CPU uses no vector instructions for a sum over all entries.
    return jnp.sum(jnp.sum(squares, -1)) if squares.ndim > 1 else jnp.sum(squares)
