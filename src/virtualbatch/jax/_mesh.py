"""Enters `jax.shard_map` over the axes of the mesh in use that rows are spread over.

Other axes of the mesh stay as they are. Inside, the engine runs as it does inside the user's own
`shard_map`.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.tree_util import tree_flatten_with_path

from virtualbatch.jax._arrays import is_array
from virtualbatch.jax._keys import folded
from virtualbatch.jax._rows import refuse_row_lists, rows_of
from virtualbatch.window.window import Window, check_window


class Axes(NamedTuple):
    """The axes of the mesh in use over which rows are spread.

    Fields:
        names: the names of the axes.
        devices: the number of devices that have rows of their own.
    """

    names: tuple[Any, ...]
    devices: int


def axes_to_enter(axis_name: Any) -> Axes | None:
    """The axes over which `shard_map` must be entered.

    Args:
        axis_name: a mesh axis or a tuple of axes, as the user gave it; or None.

    Returns:
        The axes. None if no axis is named, or if `shard_map`, `vmap` or `pmap` around the call
        already binds them.

    Raises:
        ValueError: the mesh in use does not have the axes.
        TypeError: the axes are in a list, or are no names.
    """
    if axis_name is None:
        return None
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not all(isinstance(name, Hashable) for name in names):
        raise TypeError(
            f"axis_name must be a name, or a tuple of names. Got axis_name={axis_name!r}. Pass a "
            "tuple of them."
        )
    bound = [name for name in names if _is_bound(name)]
    if len(bound) == len(names):
        return None
    mesh = jax.sharding.get_abstract_mesh()
    if bound or not set(names) <= set(mesh.axis_names):
        used = (
            f"a mesh of {', '.join(map(repr, mesh.axis_names))}" if mesh.axis_names else "no mesh"
        )
        place = f"inside of shard_map over {bound[0]!r} alone" if bound else "outside of shard_map"
        raise ValueError(
            f"axis_name must name an axis of the mesh in use. Got axis_name={axis_name!r} {place} "
            f"and {used}. Call it under jax.set_mesh(mesh), or inside shard_map."
        )
    return Axes(names, math.prod(mesh.shape[name] for name in names))


def _is_bound(name: Any) -> bool:
    try:
        lax.axis_size(name)
    # JAX takes a number that names no axis for a position, and raises a ValueError.
    except (NameError, ValueError):
        return False
    return True


def check_rows(batch: Any, axes: Axes) -> None:
    """Refuses rows that cannot be spread evenly.

    Args:
        batch: a batch or a Window.
        axes: the axes over which rows are spread.

    Raises:
        ValueError: the rows of the batch, or of a micro-batch, are no multiple of the number of
            devices.
        TypeError: a list has one entry per row.
    """
    if isinstance(batch, Window):
        check_window(batch)
        parts = [(f"window[{k}]", part) for k, part in enumerate(batch)]
    else:
        parts = [("batch", batch)]
    for path, part in parts:
        rows = rows_of(part, path)
        refuse_row_lists(part, rows, "on a mesh", "leave axis_name out")
        missing = -rows % axes.devices
        if missing:
            raise ValueError(
                "Devices of a mesh must have equally many rows. "
                f"Got {rows} rows in {path} for the {axes.devices} devices of axis "
                f"{', '.join(map(repr, axes.names))}. "
                f"Pad them to {rows + missing} with rows of weight 0."
            )


def over_devices(
    compute: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, Any]],
    axes: Axes,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    batch_argnum: int,
    key_argnum: int | None,
) -> tuple[Any, Any]:
    """Runs a computation on all devices. Each device has its own rows and keys.

    Args:
        compute: positional and keyword arguments of one device -> (values that are the same on all
            devices, values with one entry per row). Both are lists of arrays, or lists of such
            lists.
        axes: the axes over which rows are spread.
        args: positional arguments.
        kwargs: keyword arguments.
        batch_argnum: position of the batch, which may be a Window.
        key_argnum: position of the argument with PRNG keys, or None.

    Returns:
        Both lists. Values with one entry per row have the rows of all devices, in order, and are
        spread as the batch is.
    """
    by_rows = P(axes.names)
    others = [None if k == batch_argnum else arg for k, arg in enumerate(args)]
    shared, structure = jax.tree.flatten((others, kwargs))
    own, of_batch = jax.tree.flatten(args[batch_argnum])

    def on_device(shared_arrays: list[Any], own_arrays: list[Any]) -> tuple[Any, Any]:
        given, kwargs = jax.tree.unflatten(structure, filled(shared, shared_arrays))
        given[batch_argnum] = jax.tree.unflatten(of_batch, filled(own, own_arrays))
        if key_argnum is not None and axes.devices > 1:
            given[key_argnum] = folded(given[key_argnum], lax.axis_index(axes.names))
        return compute(tuple(given), kwargs)

    # With its checks, `shard_map` refuses losses that are written for one device. An example is a
    # scan that starts from zeros: zeros do not vary over devices, but the later sums do.
    run = jax.shard_map(
        on_device,
        in_specs=(P(), by_rows),
        out_specs=(P(), by_rows),
        axis_names=set(axes.names),
        check_vma=False,
    )
    arrays = (
        [placed(x, axes) for x in shared if is_array(x)],
        [placed(x, axes, by_rows=True) for x in own if is_array(x)],
    )
    try:
        # Outside jit, JAX does not run a shard_map over only some axes without these checks.
        found: tuple[Any, Any] = jax.jit(run)(*arrays)
    except NotImplementedError as error:
        if "Closing over inputs to shard_map" not in str(error):
            raise
        raise ValueError(
            "On a mesh with explicit axes a function must take arrays of JAX as arguments. "
            f"Got one that it closes over{str(error).partition('with shape')[2]}. Pass it as an "
            "argument, keywords too, or as an array of NumPy; or make the axis automatic."
        ) from error
    return found


def filled(leaves: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """The leaves, with their arrays replaced by other arrays."""
    given = iter(arrays)
    return [next(given) if is_array(x) else x for x in leaves]


def by_microbatch(leaf: Any, sizes: Sequence[int] | None) -> list[Any]:
    """Splits a device's entries per row into pieces that `in_order` joins.

    Args:
        leaf: the entries.
        sizes: the rows of each micro-batch of a Window on this device; None for a batch.
    """
    # Rows of a Window are ordered by micro-batch first, and by device second.
    return [leaf] if sizes is None else jnp.split(leaf, list(accumulate(sizes[:-1])))


def in_order(pieces: Sequence[Any]) -> Any:
    """Entries of all rows in the caller's order, from the pieces of all devices."""
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def of_last_device(x: Any, axes: Axes) -> Any:
    """The value of the device with the last rows, on all devices."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(x) if is_key else x
    is_last = lax.axis_index(axes.names) == axes.devices - 1
    found = lax.psum(jnp.where(is_last, data, jnp.zeros_like(data)), axes.names)
    found = found.astype(data.dtype)
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(x)) if is_key else found


def placed(x: Any, axes: Axes, *, by_rows: bool = False) -> Any:
    """An array as `shard_map` takes it: spread by rows over the axes, or not spread over them.

    On a mesh with explicit axes JAX does not reshard by itself.
    """
    explicit = _explicit(axes.names)
    if not explicit:
        return x
    entries = [_without(entry, axes.names) for entry in jax.typeof(x).sharding.spec]
    if by_rows:
        # Over automatic axes `shard_map` spreads rows by itself.
        entries[0] = explicit
    return _resharded(x, P(*entries))


def placed_like(parameters: Any, gradients: Any) -> Any:
    """The gradients, each spread like its parameter if types have a sharding."""
    if not _explicit(jax.sharding.get_abstract_mesh().axis_names):
        return gradients
    found = tree_flatten_with_path(parameters)[0]
    specs = {path: jax.typeof(x).sharding.spec for path, x in found if is_array(x)}
    leaves, structure = tree_flatten_with_path(gradients)
    given = [_resharded(x, specs[path]) if path in specs else x for path, x in leaves]
    return jax.tree.unflatten(structure, given)


def _resharded(x: Any, spec: P) -> Any:
    return x if jax.typeof(x).sharding.spec == spec else jax.reshard(x, spec)


def _without(entry: Any, names: Sequence[Any]) -> Any:
    """One entry of a spec, without some axes."""
    given = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(name for name in given if name is not None and name not in names)
    return kept if len(kept) > 1 else kept[0] if kept else None


def _explicit(names: Sequence[Any]) -> tuple[Any, ...]:
    """The explicit ones among some axes of the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(name for name in names if kinds[name] == AxisType.Explicit)
