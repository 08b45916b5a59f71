"""Merges results of micro-batches into one result of the window: a sum, a maximum, or the last."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from virtualbatch.jax._replicas import varies_over
from virtualbatch.window.aux import KEEP, MAX


def merged(kinds: Sequence[str], earlier: Sequence[Any], later: Sequence[Any]) -> list[Any]:
    """Merges two successive results.

    Args:
        kinds: the kind of each value. All but `KEEP` and `MAX` are sums.
        earlier: the values of the first result.
        later: the values of the second result.
    """
    return [_merged(kind, a, b) for kind, a, b in zip(kinds, earlier, later, strict=True)]


def _merged(kind: str, a: Any, b: Any) -> Any:
    if kind == KEEP:
        return b
    return jnp.maximum(a, b) if kind == MAX else jnp.add(a, b)


def nothing(kinds: Sequence[str], types: Sequence[Any]) -> list[Any]:
    """The neutral values: merged with any results, they leave the results as they are.

    Args:
        kinds: the kind of each value.
        types: the type of each value.
    """
    return [_nothing(kind, x) for kind, x in zip(kinds, types, strict=True)]


def _nothing(kind: str, x: Any) -> Any:
    return filled(x, _lowest(x.dtype) if kind == MAX else 0)


def filled(x: Any, value: Any) -> Any:
    """An array filled with one number.

    Args:
        x: the type of the array, a `ShapeDtypeStruct`.
        value: the number.
    """
    # JAX cannot fill an array whose type varies over some mesh axes while others are automatic.
    # And a filled array of keys would not vary as its type says. So the axes are added afterwards.
    found = jnp.full_like(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), value)
    varied = x.manual_axis_type.varying if x.manual_axis_type else frozenset()
    missing = tuple(varied - varies_over(found))
    return lax.pcast(found, missing, to="varying") if missing else found


def _lowest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return -jnp.inf
    return False if _is_bool(dtype) else jnp.iinfo(dtype).min


def _is_bool(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.bool_))


def over_devices(kinds: Sequence[str], values: Sequence[Any], axis_name: Any) -> list[Any]:
    """Merges results over devices.

    Args:
        kinds: the kind of each value.
        values: the values of this device.
        axis_name: a mesh axis, or a tuple of axes.
    """
    return [_over_devices(kind, x, axis_name) for kind, x in zip(kinds, values, strict=True)]


def _over_devices(kind: str, x: Any, axis_name: Any) -> Any:
    if kind == MAX:
        return _largest(x, axis_name)
    if kind != KEEP:
        return lax.psum(x, axis_name)
    # The value is equal on all devices, but its type may not say so.
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    varied = tuple(axis for axis in axes if axis in varies_over(x))
    return _largest(x, varied) if varied else x


def _largest(x: Any, axes: Any) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = lax.pmax(jax.random.key_data(x), axes)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if _is_bool(x.dtype):
        return lax.pmax(x.astype(jnp.int8), axes).astype(bool)
    return lax.pmax(x, axes)
