"""A window on the devices of a mesh in use: each device accumulates its own rows.

The engine enters `jax.shard_map` over the axis that is named, and there runs what it runs inside
of one; other axes of the mesh stay as they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.tree_util import tree_flatten_with_path

from virtualbatch.jax._arrays import is_array, map_arrays
from virtualbatch.jax._batch import (
    Cut,
    cut_batch,
    cut_into,
    on_one_device,
    refuse_row_lists,
    rows_of,
)
from virtualbatch.jax._keys import folded
from virtualbatch.jax._window import Program
from virtualbatch.window.aux import KEEP, ROWS
from virtualbatch.window.window import Window, check_window


class Axes(NamedTuple):
    """The axes of the mesh in use over which rows are spread.

    Fields:
        names: of the axes.
        devices: how many devices have rows of their own.
    """

    names: tuple[Any, ...]
    devices: int


def axes_to_enter(axis_name: Any) -> Axes | None:
    """The axes over which `shard_map` is to be entered.

    Args:
        axis_name: mesh axis, or a tuple of them, as the user gave it; or None.

    Returns:
        The axes; None where none is named, and where `shard_map`, `vmap` or `pmap` has them.

    Raises:
        ValueError: no mesh in use has them.
    """
    if axis_name is None:
        return None
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    bound = [name for name in names if _is_bound(name)]
    if len(bound) == len(names):
        return None
    mesh = jax.sharding.get_abstract_mesh()
    if bound or not set(names) <= set(mesh.axis_names):
        used = f"a mesh with axes {mesh.axis_names}" if mesh.axis_names else "no mesh"
        inside = f" that has {', '.join(map(repr, bound))}" if bound else ""
        place = f"inside of shard_map{inside}" if bound else "outside of shard_map"
        raise ValueError(
            "axis_name names an axis of the mesh in use. "
            f"Got axis_name={axis_name!r} {place} and {used}. "
            "Call it under jax.set_mesh(mesh), or inside shard_map."
        )
    return Axes(names, math.prod(mesh.shape[name] for name in names))


def _is_bound(name: Any) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


class Spread(NamedTuple):
    """Windows whose rows are spread over the devices of a mesh.

    Fields:
        program: what is run.
        axes: over which rows are spread.
        cut: rows of one device -> their micro-batches in a program.
    """

    program: Program
    axes: Axes
    cut: Callable[[Any], Cut]

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses arguments whose rows cannot be spread evenly.

        Args:
            args: positional arguments, the batch among them.
            kwargs: keyword arguments.

        Raises:
            ValueError: devices do not divide the rows of the batch or of one of its micro-batches,
                or another argument holds rows too.
            TypeError: a list has one entry per row.
        """
        batch = args[self.program.batch_argnum]
        if isinstance(batch, Window):
            check_window(batch)
            parts = [(f"window[{k}]", part) for k, part in enumerate(batch)]
        else:
            parts = [("batch", batch)]
        for path, part in parts:
            rows = rows_of(part, path)
            refuse_row_lists(part, rows, "on a mesh", "leave axis_name out")
            missing = -rows % self.axes.devices
            if missing:
                raise ValueError(
                    "Devices of a mesh must have equally many rows. "
                    f"Got {rows} rows in {path} for the {self.axes.devices} devices of axis "
                    f"{', '.join(map(repr, self.axes.names))}. "
                    f"Pad them to {rows + missing} with rows of weight 0."
                )
            if not isinstance(batch, Window):
                self.program.refuse_uncut_rows(args, kwargs, rows)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `Program.run` returns, of the rows of all devices.

        Leaves of aux with one entry per row stay spread as the rows are; all else is the same on
        all devices. Arguments are as in `check`.
        """
        program, axes = self.program, self.axes
        by_rows = P(axes.names)
        position = program.batch_argnum
        others = (*args[:position], None, *args[position + 1 :])
        shared, structure = jax.tree.flatten((others, kwargs))
        own, of_batch = jax.tree.flatten(args[position])
        outputs: list[_Outputs] = []

        def on_device(shared_arrays: list[Any], own_arrays: list[Any]) -> Any:
            others, kwargs = jax.tree.unflatten(structure, _filled(shared, shared_arrays))
            given = [*others]
            given[position] = jax.tree.unflatten(of_batch, _filled(own, own_arrays))
            if program.key_argnum is not None and axes.devices > 1:
                number = lax.axis_index(axes.names)
                given[program.key_argnum] = folded(given[program.key_argnum], number)
            cut = self.cut(given[position])
            found, kinds = program.compiled(tuple(given), kwargs, cut)
            sizes = cut.rows if isinstance(given[position], Window) else None
            outputs.append(_Outputs(found, kinds, sizes))
            return outputs[0].parts(axes)

        # With its checks on, `shard_map` refuses losses that are written for one device, such as a
        # scan that starts from zeros: zeros do not vary over devices, what is added to them does.
        over_devices = jax.shard_map(
            on_device,
            in_specs=(P(), by_rows),
            out_specs=(P(), by_rows),
            axis_names=set(axes.names),
            check_vma=False,
        )
        # Outside of a program JAX does not run a shard_map over some axes without these checks.
        same, apart = jax.jit(over_devices)(
            [_placed(x, axes, by_rows=False) for x in shared if is_array(x)],
            [_placed(x, axes, by_rows=True) for x in own if is_array(x)],
        )
        loss, aux, gradients, stats = outputs[0].joined(same, apart)
        gradients = _placed_like(program.differentiated(args), gradients)
        return program.result(loss, aux, gradients, stats)

    def as_one_device(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Cut] | None:
        """The arguments and micro-batches of a window as one device would have them all.

        Returns:
            (arguments, cut), with the batch on the host; None where other processes hold a part.
        """
        arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
        if not all(x.is_fully_addressable for x in arrays):
            return None
        position, devices = self.program.batch_argnum, self.axes.devices
        batch = map_arrays(on_one_device, args[position])
        given = [map_arrays(lambda x: _placed(x, self.axes, by_rows=False), arg) for arg in args]
        given[position] = batch
        if isinstance(batch, Window):
            return tuple(given), cut_batch(batch, None, None, compiled=False)
        rows = rows_of(batch, "batch") // devices
        first = map_arrays(lambda x: x[:rows], batch)
        return tuple(given), cut_into(batch, self.cut(first).rows * devices)


class _Outputs:
    """What a window returns on one device, as lists of equal spread, and put together again.

    Args:
        found: loss, aux, gradients and statistics.
        kinds: how the leaves of aux are put together.
        sizes: rows of the micro-batches of a Window; None for a batch.
    """

    def __init__(
        self,
        found: tuple[Any, Any, Any, Any],
        kinds: Sequence[str],
        sizes: Sequence[int] | None,
    ):
        loss, aux, gradients, stats = found
        self._aux, self._aux_structure = jax.tree.flatten(aux)
        self._rest, self._rest_structure = jax.tree.flatten((loss, gradients, stats))
        self._kinds = kinds
        self._sizes = sizes

    def parts(self, axes: Axes) -> tuple[list[Any], list[list[Any]]]:
        """What is the same on all devices, and for each leaf by rows its pieces."""
        same = [x for x in self._rest if is_array(x)]
        apart = []
        for kind, leaf in zip(self._kinds, self._aux, strict=True):
            if kind == ROWS:
                apart.append(self._pieces(leaf))
            else:
                same.append(_of_last_device(leaf, axes) if kind == KEEP else leaf)
        return same, apart

    def _pieces(self, leaf: Any) -> list[Any]:
        # Rows of a Window go by micro-batch first, and by device second.
        if self._sizes is None:
            return [leaf]
        ends = [sum(self._sizes[: k + 1]) for k in range(len(self._sizes) - 1)]
        return jnp.split(leaf, ends)

    def joined(self, same: Sequence[Any], apart: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        """Loss, aux, gradients and statistics, of what came out of all devices."""
        count = sum(map(is_array, self._rest))
        rest = jax.tree.unflatten(self._rest_structure, _filled(self._rest, same[:count]))
        merged, rows = iter(same[count:]), iter(apart)
        aux = [_in_order(next(rows)) if kind == ROWS else next(merged) for kind in self._kinds]
        loss, gradients, stats = rest
        return loss, jax.tree.unflatten(self._aux_structure, aux), gradients, stats


def _in_order(pieces: Sequence[Any]) -> Any:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def _filled(leaves: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """The leaves, with other arrays in the places of theirs."""
    given = iter(arrays)
    return [next(given) if is_array(x) else x for x in leaves]


def _of_last_device(x: Any, axes: Axes) -> Any:
    """What the device of the last rows has, for all of them."""
    if not is_array(x):
        return x
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(x) if is_key else x
    is_last = lax.axis_index(axes.names) == axes.devices - 1
    found = lax.psum(jnp.where(is_last, data, jnp.zeros_like(data)), axes.names)
    found = found.astype(data.dtype)
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(x)) if is_key else found


def _placed(x: Any, axes: Axes, *, by_rows: bool) -> Any:
    """An array as `shard_map` takes it: over the axes spread by rows, or not at all.

    On a mesh with explicit axes JAX moves nothing by itself.
    """
    if not _is_explicit(axes.names):
        return x
    spec = jax.typeof(x).sharding.spec
    others = [_without(entry, axes.names) for entry in spec]
    if by_rows:
        others[0] = axes.names
    return _resharded(x, P(*others))


def _resharded(x: Any, spec: P) -> Any:
    return x if jax.typeof(x).sharding.spec == spec else jax.reshard(x, spec)


def _without(entry: Any, names: Sequence[Any]) -> Any:
    """One entry of a spec, without some axes."""
    given = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(name for name in given if name is not None and name not in names)
    return kept if len(kept) > 1 else kept[0] if kept else None


def _is_explicit(names: Sequence[Any]) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return any(kinds[name] == AxisType.Explicit for name in names)


def _placed_like(parameters: Any, gradients: Any) -> Any:
    """Gradients, each spread as its parameter is where types tell that."""
    if not _is_explicit(jax.sharding.get_abstract_mesh().axis_names):
        return gradients
    found = tree_flatten_with_path(parameters)[0]
    specs = {path: jax.typeof(x).sharding.spec for path, x in found if is_array(x)}
    leaves, structure = tree_flatten_with_path(gradients)
    placed = [_resharded(x, specs[path]) if path in specs else x for path, x in leaves]
    return jax.tree.unflatten(structure, placed)
