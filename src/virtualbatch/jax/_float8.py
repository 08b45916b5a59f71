"""Values in place of gradients: the float8 scales and histories of Flax.

Flax keeps them in a collection of its own among the parameters, and its backward pass gives their
new values in place of gradients. A history holds maxima, so a window's history is the maximum over
its micro-batches. A scale is computed from the history before, so all micro-batches agree on it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

# `flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT`
_COLLECTION = "_overwrite_with_gradient"


def split(gradients: Any) -> tuple[list[Any], list[Any]]:
    """The leaves of what differentiation gave: (gradients, new values)."""
    leaves = tree_flatten_with_path(gradients)[0]
    added = [leaf for path, leaf in leaves if not _is_new_value(path)]
    return added, [leaf for path, leaf in leaves if _is_new_value(path)]


def put_together(dtypes: Any, added: Sequence[Any], new: Sequence[Any]) -> Any:
    """The inverse of `split`.

    Args:
        dtypes: what to cast the leaves to, in the structure of what was split.
        added: the gradients.
        new: the new values.
    """
    gradients, values = iter(added), iter(new)

    def leaf(path: Any, dtype: Any) -> Any:
        return next(values if _is_new_value(path) else gradients).astype(dtype)

    return tree_map_with_path(leaf, dtypes)


def _is_new_value(path: Sequence[Any]) -> bool:
    return any(getattr(key, "key", None) == _COLLECTION for key in path)


def refuse_new_values(arguments: Any) -> None:
    """Refuses arguments whose gradients are new values, where JAX itself would add them up.

    Raises:
        ValueError: there are some.
    """
    found = [
        keystr(path) for path, _ in tree_flatten_with_path(arguments)[0] if _is_new_value(path)
    ]
    if found:
        raise ValueError(
            "rowwise adds up gradients, but the gradient of float8 state is its new value. Got "
            f"{found[0]}. Keep float8 out of fn, or train in bfloat16."
        )


def seen(new: Sequence[Any]) -> list[Any]:
    """New values of one run; one without weight has seen no number in its backward pass."""
    return [jnp.where(jnp.isnan(value), 0, value) for value in new]


def largest(earlier: Sequence[Any], later: Sequence[Any]) -> list[Any]:
    """New values of two runs as those of both."""
    return [jnp.maximum(a, b) for a, b in zip(earlier, later, strict=True)]
