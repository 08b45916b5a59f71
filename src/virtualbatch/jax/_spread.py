"""A window whose rows are spread over the mesh in use: each device accumulates its own rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from virtualbatch.jax._arrays import is_array, map_arrays
from virtualbatch.jax._batch import cut_batch, cut_into
from virtualbatch.jax._mesh import (
    Axes,
    by_microbatch,
    check_rows,
    filled,
    in_order,
    of_last_device,
    over_devices,
    placed,
    placed_like,
)
from virtualbatch.jax._rows import on_one_device, rows_of
from virtualbatch.jax._segment import Cut
from virtualbatch.jax._window import Program
from virtualbatch.window.aux import KEEP, ROWS
from virtualbatch.window.window import Window


class Spread(NamedTuple):
    """Windows whose rows are spread over the devices of a mesh.

    Fields:
        program: the loss and its options.
        axes: the axes over which rows are spread.
        cut: rows of one device -> their micro-batches in a program.
    """

    program: Program
    axes: Axes
    cut: Callable[[Any], Cut]

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses arguments whose rows cannot be spread.

        Args:
            args: positional arguments, the batch among them.
            kwargs: keyword arguments.

        Raises:
            ValueError: another argument holds rows too, or `check_rows` refuses the rows.
            TypeError: `check_rows` refuses a list.
        """
        batch = args[self.program.batch_argnum]
        check_rows(batch, self.axes)
        if not isinstance(batch, Window):
            self.program.refuse_uncut_rows(args, kwargs, rows_of(batch, "batch"))

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `Program.run` for the rows of all devices.

        Leaves of aux with one entry per row stay spread like the rows. All other results are the
        same on all devices. Arguments are as in `check`.
        """
        program, position = self.program, self.program.batch_argnum
        outputs: list[_Outputs] = []

        def compute(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            cut = self.cut(args[position])
            found, kinds = program.compiled(args, kwargs, cut)
            sizes = cut.rows if isinstance(args[position], Window) else None
            outputs.append(_Outputs(map_arrays(jax.typeof, found), kinds, sizes))
            return _Outputs(found, kinds, sizes).apart(self.axes)

        same, by_rows = over_devices(compute, self.axes, args, kwargs, position, program.key_argnum)
        loss, aux, gradients, stats = outputs[0].together(same, by_rows)
        gradients = placed_like(program.differentiated(args), gradients)
        return program.result(loss, aux, gradients, stats)

    def as_one_device(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Cut] | None:
        """The arguments and micro-batches of a window, as if one device had all of them.

        Returns:
            (arguments, cut), with the batch on the host; None if other processes hold a part of an
            array.
        """
        arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
        if not all(x.is_fully_addressable for x in arrays):
            return None
        position, devices = self.program.batch_argnum, self.axes.devices
        batch = map_arrays(on_one_device, args[position])
        given = [map_arrays(lambda x: placed(x, self.axes), arg) for arg in args]
        given[position] = batch
        if isinstance(batch, Window):
            return tuple(given), cut_batch(batch, None, None, compiled=False)
        rows = rows_of(batch, "batch") // devices
        first = map_arrays(lambda x: x[:rows], batch)
        return tuple(given), cut_into(batch, self.cut(first).rows * devices)


class _Outputs(NamedTuple):
    """The results of a window on one device.

    Fields:
        found: loss, aux, gradients and statistics.
        kinds: how the leaves of aux are merged.
        sizes: the rows of each micro-batch of a Window; None for a batch.
    """

    found: tuple[Any, Any, Any, Any]
    kinds: list[str]
    sizes: list[int] | None

    def apart(self, axes: Axes) -> tuple[list[Any], list[list[Any]]]:
        """The values that are the same on all devices, and the pieces of each leaf by rows."""
        same, by_rows = list(filter(is_array, self._others())), []
        for kind, leaf in zip(self.kinds, jax.tree.leaves(self.found[1]), strict=True):
            if kind == ROWS:
                by_rows.append(by_microbatch(leaf, self.sizes))
            else:
                same.append(of_last_device(leaf, axes) if kind == KEEP else leaf)
        return same, by_rows

    def together(self, same: list[Any], by_rows: list[list[Any]]) -> tuple[Any, Any, Any, Any]:
        """Loss, aux, gradients and statistics of all devices, from two lists as in `apart`."""
        others = self._others()
        count = sum(map(is_array, others))
        loss, aux, gradients, stats = self.found
        structure = jax.tree.structure((loss, gradients, stats))
        loss, gradients, stats = jax.tree.unflatten(structure, filled(others, same[:count]))
        merged, rows = iter(same[count:]), iter(by_rows)
        leaves = [in_order(next(rows)) if kind == ROWS else next(merged) for kind in self.kinds]
        return loss, jax.tree.unflatten(jax.tree.structure(aux), leaves), gradients, stats

    def _others(self) -> list[Any]:
        loss, _, gradients, stats = self.found
        return jax.tree.leaves((loss, gradients, stats))
