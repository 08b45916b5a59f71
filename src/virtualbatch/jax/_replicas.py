"""Batches that are spread over the devices of a mesh axis (`shard_map`, or a named `vmap`)."""

from typing import Any

import jax
from jax import lax


def varying(args: Any, axis_name: Any) -> Any:
    """Arguments whose gradients stay on each device until the window is done.

    Inside `shard_map` JAX sums the gradient of a replicated parameter over the devices in every
    backward pass. To get one reduction per window, each device differentiates with respect to a
    value of its own.

    Args:
        args: pytree of the arguments that are differentiated.
        axis_name: a mesh axis, or a tuple of axes.

    Returns:
        The same values.
    """
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    manual = jax.sharding.get_abstract_mesh().manual_axes

    def own(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        missing = tuple(a for a in axes if a in manual and a not in varies_over(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(own, args)


def varies_over(x: Any) -> frozenset[Any]:
    """The mesh axes over whose devices an array may differ, by its type."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)
