"""The arrays among the arguments of a function, separated from other leaves of a pytree.

Modules also have functions, texts and numbers as leaves. No transformation of JAX takes these.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, a tracer, or a `ShapeDtypeStruct`."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def map_arrays(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Applies fn to every array of a pytree. Other leaves stay as they are."""
    return jax.tree.map(lambda leaf: fn(leaf) if is_array(leaf) else leaf, tree)


def on_host(x: Any) -> np.ndarray:
    """An array as a NumPy array. Typed keys become the numbers that they consist of."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def of_arrays(
    fun: Callable[..., Any], transform: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """Transforms a function with respect to the arrays among its arguments.

    Args:
        fun: a function of pytrees.
        transform: such as `jax.jit`. It is called once for each structure and set of other leaves.
            So each program is traced once per shape.

    Returns:
        A function with fun's arguments.
    """
    made: dict[Any, Callable[..., Any]] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = [leaf if is_array(leaf) else None for leaf in leaves]
        others = [None if is_array(leaf) else leaf for leaf in leaves]

        def joined(arrays: Sequence[Any]) -> Any:
            both = [x if y is None else y for x, y in zip(others, arrays, strict=True)]
            args, kwargs = jax.tree.unflatten(structure, both)
            return fun(*args, **kwargs)

        key = (structure, tuple(map(id, others)))
        if key not in made:
            made[key] = transform(joined)
        return made[key](arrays)

    return run
