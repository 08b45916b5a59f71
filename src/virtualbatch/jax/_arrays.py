"""The arrays among the arguments of a function, separated from other leaves of a pytree.

Modules have functions, texts and numbers as leaves, which no transformation of JAX takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, a trace of one, or a description of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def map_arrays(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Applies fn to every array of a pytree; other leaves stay."""
    return jax.tree.map(lambda leaf: fn(leaf) if is_array(leaf) else leaf, tree)


def on_host(x: Any) -> np.ndarray:
    """An array as one of NumPy; of typed keys, the numbers that they are made of."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def of_arrays(
    fun: Callable[..., Any], transform: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """A function, transformed as one of the arrays among its arguments.

    Args:
        fun: takes pytrees.
        transform: such as `jax.jit`; called once for each structure and set of other leaves, so
            that what it traces is traced once per shape.

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
