"""What a plan depends on, and arguments that replace traced ones while a plan is made."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.jax._arrays import is_array
from virtualbatch.jax._remembered import remembered
from virtualbatch.jax._rows import rows_of
from virtualbatch.plan.auto import Auto
from virtualbatch.plan.signature import Leaf, Signature


def kept_sizes(
    fun: Callable[..., Any], loss: str, args: Sequence[Any], kwargs: Any, batch_argnum: int
) -> Auto:
    """The sizes of a loss for which the user passed no `Auto`.

    Args:
        fun: the loss, which may have been made for this call alone.
        loss: the fingerprint of the loss.
        args: positional arguments. All but the batch tell models apart.
        kwargs: keyword arguments. They tell models apart too.
        batch_argnum: position of the batch.
    """
    key = f"{loss}, arguments {_parameters(args, kwargs, batch_argnum)}"
    return remembered(fun).sizes.setdefault(key, Auto())


def signature(loss: str, args: Sequence[Any], kwargs: Any, batch_argnum: int) -> Signature:
    """The signature of a call.

    Args:
        loss: the fingerprint of the function that is called.
        args: positional arguments, with arrays or tracers.
        kwargs: keyword arguments, with arrays or tracers.
        batch_argnum: position of the batch.
    """
    batch = args[batch_argnum]
    leaves, _ = tree_flatten_with_path(batch)
    parameters = _parameters(args, kwargs, batch_argnum)
    return Signature(
        f"jax {jax.__version__} on {_device()}, arguments {parameters}",
        loss,
        rows_of(batch, "batch"),
        tuple(
            Leaf(f"batch{keystr(place)}", tuple(x.shape[1:]), str(x.dtype))
            for place, x in leaves
            if is_array(x)
        ),
    )


def _parameters(args: Sequence[Any], kwargs: Any, batch_argnum: int) -> str:
    """The dtypes and shapes of all arrays except the batch, in words."""
    others = [*args[:batch_argnum], *args[batch_argnum + 1 :], kwargs]
    return ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(others) if is_array(x))


@cache
def _device() -> str:
    device = jax.devices()[0]
    statistics = device.memory_stats()
    if statistics is None:
        return str(device.platform)
    return f"{device.platform}, {device.device_kind} of {statistics['bytes_limit']} bytes"


def stand_ins(arguments: Any) -> Any:
    """Arguments of the same shapes, for which programs can be compiled and mostly also run.

    Inside a trace there are no values, so zeros replace them. Zeros are valid indices and classes,
    and take as long as other numbers. Only keys cannot be replaced by zeros.
    """

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return np.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(stand_in, arguments)


def needs_values(arguments: Any) -> str | None:
    """Why a plan cannot be made inside this call; None if it can."""
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf, jax.core.Tracer) and jax.typeof(leaf).manual_axis_type.varying:
            return "a call inside shard_map"
    return None
