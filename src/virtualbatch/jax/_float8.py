"""New values in place of gradients: the float8 scales and histories of Flax.

Flax keeps scales and histories in a collection of its own among the parameters. Its backward pass
returns their new values in place of gradients. A history holds maxima, so the history of a window
is the maximum over its micro-batches. A scale is computed from the history before the window, so it
is the same in all micro-batches.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

# `flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT`
_COLLECTION = "_overwrite_with_gradient"


def split(gradients: Any) -> tuple[list[Any], list[Any]]:
    """The leaves of a result of differentiation: (gradients, new values)."""
    leaves = tree_flatten_with_path(gradients)[0]
    added = [leaf for path, leaf in leaves if not _is_new_value(path)]
    return added, [leaf for path, leaf in leaves if _is_new_value(path)]


def put_together(dtypes: Any, added: Sequence[Any], new: Sequence[Any]) -> Any:
    """The inverse of `split`.

    Args:
        dtypes: the dtypes to cast the leaves to, in the structure that was split.
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
    """Refuses arguments whose gradients are new values, because JAX would add the values up.

    Raises:
        ValueError: there is such an argument.
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
    """New values of one run. NaN becomes 0: a run without weight has seen no valid gradient."""
    return [jnp.where(jnp.isnan(value), 0, value) for value in new]


def largest(earlier: Sequence[Any], later: Sequence[Any]) -> list[Any]:
    """New values of two runs, merged."""
    return [jnp.maximum(a, b) for a, b in zip(earlier, later, strict=True)]
