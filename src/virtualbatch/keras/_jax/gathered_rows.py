"""Arrays with the rows of a whole window, from what its micro-batches have kept, and back."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from virtualbatch.jax._segment import Cut
from virtualbatch.keras._jax.devices import CutByDevice
from virtualbatch.keras._jax.packing import branches

# One per array, or None where there is none.
Arrays = Sequence[Any]


class GatheredRows:
    """The order of a window's rows, and the length of those that are trimmed.

    Args:
        cut: the batch, cut.
        order: numbers of the rows as they were cut, where they are packed; else None.
        arrays: (micro-batch, its rows) -> what is kept of it.
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
        """All rows, in the order of the batch.

        Args:
            kept: for each segment its arrays, micro-batches stacked.
        """
        return [
            None if pieces[0] is None else self._joined(pieces)
            for pieces in zip(*kept, strict=True)
        ]

    def padded(self, arrays: Arrays) -> list[Any]:
        """What is kept of a micro-batch, as long as if its rows were not trimmed; zeros there."""
        if not self.is_packed:
            return list(arrays)
        if self._whole is None:
            # Rows of the last branch are not trimmed, and only shapes are computed.
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
    """All rows from micro-batches that have rows of each device, stacked."""
    row = pieces[0].shape[2:]
    by_device = [
        x.reshape(len(x), devices, -1, *row).swapaxes(0, 1).reshape(devices, -1, *row)
        for x in pieces
    ]
    return jnp.concatenate(by_device, axis=1).reshape(-1, *row)


def _padded(found: Any, shape: Sequence[int]) -> Any:
    missing = [(0, 0), *((0, n - here) for n, here in zip(shape[1:], found.shape[1:], strict=True))]
    return jnp.pad(found, missing) if any(after for _, after in missing) else found
