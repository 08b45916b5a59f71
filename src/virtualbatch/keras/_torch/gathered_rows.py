"""Tensors with the rows of a whole window, written and read by micro-batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Place(NamedTuple):
    """Where the rows of a micro-batch stand among those of its window.

    Fields:
        rows: a slice, or their numbers as a tensor.
        length: to which they are trimmed; None where they are not.
        padded: length to which they were padded; None where they are not trimmed.
    """

    rows: Any
    length: int | None = None
    padded: int | None = None

    @property
    def is_trimmed(self) -> bool:
        """Whether padding was cut off."""
        return self.length != self.padded


class GatheredRows:
    """Tensors of which every micro-batch of a window has one entry per row.

    Memory for all rows is taken at once, so that they never exist twice.

    Args:
        rows: rows of the window.
        trimmed: for each tensor, whether its second axis is the one that is trimmed.
    """

    def __init__(self, rows: int, trimmed: Sequence[bool]):
        self._rows = rows
        self._trimmed = trimmed
        self._tensors: list[torch.Tensor | None] = []

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """All rows, in the order of the window. Where they were trimmed there are zeros."""
        return self._tensors

    def write(self, place: Place, tensors: Sequence[torch.Tensor | None]) -> None:
        """Takes in the rows of a micro-batch.

        Args:
            place: of these rows.
            tensors: without a graph, or None.

        Raises:
            ValueError: a tensor, such as a mask, is there for some micro-batches only.
        """
        if not self._tensors:
            self._tensors = [
                None if found is None else self._empty(found, place, trimmed)
                for found, trimmed in zip(tensors, self._trimmed, strict=True)
            ]
        for rows, found, trimmed in zip(self._tensors, tensors, self._trimmed, strict=True):
            if (rows is None) != (found is None):
                raise ValueError(
                    "Predictions that a loss sees for all rows must have a mask for every "
                    "micro-batch or for none. Got a mask for some of them. "
                    "Return a mask of ones where compute_mask has none."
                )
            if rows is not None and found is not None:
                target = rows[:, : place.length] if trimmed else rows
                target[place.rows] = found

    def of(self, place: Place, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The rows of a micro-batch, trimmed as they are.

        Args:
            place: of these rows.
            tensors: in the shapes of `tensors`, or None.
        """
        return [
            None if found is None else (found[:, : place.length] if trimmed else found)[place.rows]
            for found, trimmed in zip(tensors, self._trimmed, strict=True)
        ]

    def _empty(self, found: torch.Tensor, place: Place, trimmed: bool) -> torch.Tensor:
        shape = list(found.shape[1:])
        if not trimmed:
            return found.new_empty((self._rows, *shape))
        return found.new_zeros((self._rows, place.padded or shape[0], *shape[1:]))
