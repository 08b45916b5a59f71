"""The devices over which `keras.distribution` spreads the rows of a batch, and a cut by them.

Inside a Keras program, array types do not show devices, because Keras' meshes leave placement to
XLA. So we read the distribution in use. Each micro-batch takes the same number of rows from every
device: no row moves to another device, and every device computes its own rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import keras
from jax import lax

from virtualbatch.jax._segment import Cut, Segment


@dataclass(frozen=True)
class CutByDevice(Cut):
    """A batch that is cut on each of its devices.

    Fields:
        devices: the number of devices. Each holds consecutive rows of the batch. A micro-batch has
            equally many rows of each device, one device after the other.
    """

    devices: int = 1

    @property
    def rows_in_order(self) -> list[Any]:
        """See `Cut`: each micro-batch has rows of every device."""
        return [None] * self.count


def devices_of_rows() -> int:
    """The number of devices over which the distribution in use spreads rows."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    axis = distribution.get_data_layout((1,)).axes[0]
    mesh = distribution.device_mesh
    return 1 if axis is None else int(mesh.shape[list(mesh.axis_names).index(axis)])


def devices_of(rows: int) -> int:
    """The number of devices over which a batch is spread.

    Keras spreads a batch only if its rows divide evenly among the devices.

    Args:
        rows: the rows of the batch.
    """
    devices = devices_of_rows()
    return devices if rows % devices == 0 else 1


def rows_of_one_device(rows: int) -> int:
    """The rows of a batch that one device computes.

    Args:
        rows: the rows of the batch.
    """
    return rows // devices_of(rows)


def processes_of_rows() -> int:
    """The number of processes that own the devices of the distribution in use."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    devices = distribution.device_mesh.backend_mesh.devices
    return len({device.process_index for device in devices.flat})


def spread(batch: Any) -> Any:
    """The batch, spread over devices as `fit` does; unchanged without a distribution."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return batch

    def placed(leaf: Any) -> Any:
        layout = distribution.get_data_layout(leaf.shape)
        return keras.distribution.distribute_tensor(leaf, layout)

    return jax.tree.map(placed, batch)


@contextmanager
def on_every_device() -> Iterator[None]:
    """Turns the distribution off inside the context, so every device computes all rows.

    Trials use it for a few rows, which may not divide evenly among devices.
    """
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)


def cut_by_device(batch: Any, rows: int, size: int, devices: int) -> CutByDevice:
    """Cuts the rows of each device in the same way, into equal micro-batches and a remainder.

    Args:
        batch: pytree of arrays.
        rows: their rows, a multiple of the devices.
        size: rows of a micro-batch on one device.
        devices: the number of devices over which the rows are spread.
    """
    here = rows // devices
    count, rest = divmod(here, size)
    segments = [Segment(count, size * devices, _pieces(batch, devices, 0, size))]
    if rest:
        get = _pieces(batch, devices, count * size, rest)
        segments.append(Segment(1, rest * devices, get))
    return CutByDevice(segments, devices=devices)


def _pieces(batch: Any, devices: int, start: int, size: int) -> Callable[[Any], Any]:
    def piece(leaf: Any, index: Any) -> Any:
        by_device = leaf.reshape(devices, -1, *leaf.shape[1:])
        found = lax.dynamic_slice_in_dim(by_device, start + index * size, size, axis=1)
        return found.reshape(-1, *leaf.shape[1:])

    return lambda index: jax.tree.map(partial(piece, index=index), batch)
