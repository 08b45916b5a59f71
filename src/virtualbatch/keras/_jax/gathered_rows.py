"""Arrays with all rows of a window, made from the arrays that its micro-batches keep."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from virtualbatch.jax._segment import Cut
from virtualbatch.keras._jax.devices import CutByDevice
from virtualbatch.keras._jax.packing import branches

# One entry per array; None stands for a mask that does not exist.
Arrays = Sequence[Any]


class GatheredRows:
    """Puts the rows of a window in order, and pads trimmed rows to one length.

    Args:
        cut: the batch, cut.
        order: row numbers in the order of the cut, if rows are packed; else None.
        arrays: (micro-batch, its rows) -> the arrays that are kept of it.
    """

    def __init__(self, cut: Cut, order: Any, arrays: Callable[[Any, int], Arrays]):
        self._cut = cut
        self._order = order
        self._arrays = arrays
        self._whole: Arrays | None = None

    @property
    def is_packed(self) -> bool:
        """Whether rows are packed."""
        return self._order is not None

    def joined(self, kept: Sequence[Arrays]) -> list[Any]:
        """Arrays of all rows, in the order of the batch.

        Args:
            kept: for each segment its arrays, with micro-batches stacked.
        """
        return [
            None if pieces[0] is None else self._joined(pieces)
            for pieces in zip(*kept, strict=True)
        ]

    def padded(self, arrays: Arrays) -> list[Any]:
        """Pads the arrays of a micro-batch with zeros to their length before trimming."""
        if not self.is_packed:
            return list(arrays)
        if self._whole is None:
            # The last branch does not trim. Only shapes are computed.
            last = self._cut.segments[-1]
            longest = branches(last)[-1]
            self._whole = jax.eval_shape(lambda: self._arrays(longest(0), last.rows))
        return [
            None if found is None else _padded(found, whole.shape)
            for found, whole in zip(arrays, self._whole, strict=False)
        ]

    def _joined(self, pieces: Sequence[Any]) -> Any:
        if isinstance(self._cut, CutByDevice):
            return _joined_by_device(pieces, self._cut.devices)
        first, *rest = pieces
        if self._cut.interleaved:
            first = first.swapaxes(0, 1)
        rows = jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in (first, *rest)])
        return rows if self._order is None else rows[jnp.argsort(self._order)]


def _joined_by_device(pieces: Sequence[Any], devices: int) -> Any:
    """All rows, from stacked micro-batches that have rows of each device."""
    row = pieces[0].shape[2:]
    by_device = [
        x.reshape(len(x), devices, -1, *row).swapaxes(0, 1).reshape(devices, -1, *row)
        for x in pieces
    ]
    return jnp.concatenate(by_device, axis=1).reshape(-1, *row)


def _padded(found: Any, shape: Sequence[int]) -> Any:
    missing = [(0, 0), *((0, n - here) for n, here in zip(shape[1:], found.shape[1:], strict=True))]
    return jnp.pad(found, missing) if any(after for _, after in missing) else found
