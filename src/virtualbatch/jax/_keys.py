"""Random keys that differ between the micro-batches of a window."""

from typing import Any

import jax
import jax.numpy as jnp


def folded(keys: Any, index: Any) -> Any:
    """Keys of one micro-batch.

    Args:
        keys: pytree of PRNG keys: typed key arrays of any shape, or raw keys of `PRNGKey`.
        index: the number of the micro-batch in its window; an int or an int32 scalar.

    Returns:
        The same structure, with each key folded with the index (`jax.random.fold_in`).
    """

    def fold(key: Any) -> Any:
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or not key.shape:
            return jax.random.fold_in(key, index)
        flat = key.reshape(-1)
        return jax.vmap(lambda one: jax.random.fold_in(one, index))(flat).reshape(key.shape)

    return jax.tree.map(fold, keys)


def check_keys(keys: Any) -> None:
    """Refuses leaves that are not keys.

    Raises:
        TypeError: a leaf is neither a typed key array nor a raw key.
    """
    for leaf in jax.tree.leaves(keys):
        dtype = getattr(leaf, "dtype", None)
        typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        raw = dtype == jnp.uint32 and leaf.ndim == 1
        if not typed and not raw:
            got = type(leaf).__name__ if dtype is None else f"dtype {dtype}, shape {leaf.shape}"
            raise TypeError(
                "key_argnum must name an argument that holds PRNG keys only. "
                f"Got a leaf of {got}. Pass jax.random.key(seed), or leave key_argnum out."
            )
