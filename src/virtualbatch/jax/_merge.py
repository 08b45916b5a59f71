"""Results of micro-batches that become one of the window: a sum, the largest, or the last."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from virtualbatch.jax._replicas import varies_over
from virtualbatch.window.aux import KEEP, MAX


def merged(kinds: Sequence[str], earlier: Sequence[Any], later: Sequence[Any]) -> list[Any]:
    """Two results in a row as one.

    Args:
        kinds: of each value; all but `KEEP` and `MAX` are sums.
        earlier: values of what came first.
        later: values of what came next.
    """
    return [_merged(kind, a, b) for kind, a, b in zip(kinds, earlier, later, strict=True)]


def _merged(kind: str, a: Any, b: Any) -> Any:
    if kind == KEEP:
        return b
    return jnp.maximum(a, b) if kind == MAX else jnp.add(a, b)


def nothing(kinds: Sequence[str], types: Sequence[Any]) -> list[Any]:
    """What leaves results as they are when they are merged with it.

    Args:
        kinds: of each value.
        types: their types.
    """
    return [_nothing(kind, x) for kind, x in zip(kinds, types, strict=True)]


def _nothing(kind: str, x: Any) -> Any:
    return filled(x, _lowest(x.dtype) if kind == MAX else 0)


def filled(x: Any, value: Any) -> Any:
    """An array of one number.

    Args:
        x: its type, a `ShapeDtypeStruct`.
        value: the number.
    """
    # JAX fills no type that varies over some axes of a mesh while others are automatic, and a key
    # does not take over from its type that it varies.
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
    """Results of devices as those of all of them.

    Args:
        kinds: of each value.
        values: the values.
        axis_name: mesh axis, or a tuple of them.
    """
    return [_over_devices(kind, x, axis_name) for kind, x in zip(kinds, values, strict=True)]


def _over_devices(kind: str, x: Any, axis_name: Any) -> Any:
    if kind == MAX:
        return _largest(x, axis_name)
    if kind != KEEP:
        return lax.psum(x, axis_name)
    # Equal on all devices, which its type may not say.
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
