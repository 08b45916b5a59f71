"""The rows that the arrays of a batch share, and its lists with one entry per row."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.jax._arrays import is_array, on_host
from virtualbatch.window.row_list import RowList, is_list
from virtualbatch.window.tree import array_leaves, common_rows, rows_if_shared

# Classes of leaves that belong to every row.
_PLAIN = (numbers.Number, str, bytes, type(None))


def rows_of(batch: Any, path: str, or_else: str = "") -> int:
    """Rows that all arrays of a batch share.

    Args:
        batch: pytree.
        path: the name of the batch in errors.
        or_else: the end of error messages.

    Raises:
        ValueError: rows differ or are missing.
        TypeError: arrays are hidden in an object that is no pytree.
    """
    leaves, _ = tree_flatten_with_path(batch, is_leaf=is_row_list)
    for place, leaf in leaves:
        hidden = _hidden(leaf, path + keystr(place))
        if hidden:
            raise TypeError(
                "Arrays of a batch must be where JAX finds them. "
                f"Got {hidden[0][0]} inside of {type(leaf).__name__}, which is no pytree. "
                f"Pass a dict, or register the class: jax.tree_util.register_dataclass.{or_else}"
            )
    arrays = [(path + keystr(place), leaf) for place, leaf in leaves if is_array(leaf)]
    rows = common_rows(arrays, or_else)
    if rows is None:
        raise ValueError("internal: an array has no number of rows.")
    return rows


def rows_if_told(microbatch: Any) -> int | None:
    """Rows of a Window's micro-batch; None if its arrays share no rows, or may be hidden."""
    leaves = jax.tree.leaves(microbatch, is_leaf=is_row_list)
    if not all(is_array(x) or isinstance(x, _PLAIN) or is_row_list(x) for x in leaves):
        return None
    return rows_if_shared(("", leaf) for leaf in leaves if is_array(leaf))


def _hidden(leaf: Any, path: str) -> list[tuple[str, Any]]:
    return [] if hasattr(leaf, "shape") else array_leaves(leaf, path)


def is_row_list(node: Any) -> bool:
    """Whether a node of a pytree is a list without arrays (see `is_list`), which is one leaf."""
    return is_list(node) and not any(hasattr(x, "shape") for x in jax.tree.leaves(node))


def refuse_row_lists(batch: Any, rows: int, where: str, instead: str) -> None:
    """Refuses lists with one entry per row, which no compiled program can cut.

    Args:
        batch: pytree.
        rows: the rows of the batch.
        where: where the program is, in words.
        instead: what to do if no array can replace the list, in words.

    Raises:
        TypeError: there is such a list.
    """
    if with_row_lists(batch, rows) is not batch:
        raise TypeError(
            "A list as long as the batch must be cut with it, but a compiled program cannot cut "
            f"lists. Got one beside {rows} rows, {where}. Pass an array for it, or {instead}. See "
            "docs/guides/rows.md."
        )


def with_row_lists(batch: Any, rows: int) -> Any:
    """The batch, with lists marked that have one entry per row; unchanged if there are none."""
    found = [x for x in jax.tree.leaves(batch, is_leaf=is_row_list) if isinstance(x, list | tuple)]
    if not any(len(leaf) == rows for leaf in found):
        return batch
    return jax.tree.map(
        lambda x: RowList(x) if isinstance(x, list | tuple) and len(x) == rows else x,
        batch,
        is_leaf=is_row_list,
    )


def map_lists(fn: Callable[[RowList], Any], batch: Any) -> Any:
    """Applies fn to every marked list. Other leaves stay as they are."""
    return jax.tree.map(lambda leaf: fn(leaf) if isinstance(leaf, RowList) else leaf, batch)


def on_one_device(x: Any) -> Any:
    """The array, copied to the host if it is spread over devices."""
    # On an explicit mesh, some rows of a sharded array would have no valid sharding.
    if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
        return x
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(x)
    return jax.random.wrap_key_data(on_host(x), impl=jax.random.key_impl(x))
