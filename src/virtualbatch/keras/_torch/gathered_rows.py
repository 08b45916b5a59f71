"""Tensors with all rows of a window, written and read one micro-batch at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Place(NamedTuple):
    """Where the rows of a micro-batch stand among the rows of its window.

    Fields:
        rows: a slice, or row numbers as a tensor.
        length: the length to which the rows are trimmed; None if they are not packed.
        padded: the length to which the rows were padded; None if they are not packed.
    """

    rows: Any
    length: int | None = None
    padded: int | None = None

    @property
    def is_trimmed(self) -> bool:
        """Whether padding was cut off."""
        return self.length != self.padded


class GatheredRows:
    """Tensors with one entry per row of a window, filled one micro-batch at a time.

    Memory for all rows is allocated at once, so the rows never exist twice.

    Args:
        rows: rows of the window.
        trimmed: for each tensor, whether its second axis is trimmed.
    """

    def __init__(self, rows: int, trimmed: Sequence[bool]):
        self._rows = rows
        self._trimmed = trimmed
        self._tensors: list[torch.Tensor | None] = []

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """All rows, in the order of the window. Zeros stand where rows were trimmed."""
        return self._tensors

    def write(self, place: Place, tensors: Sequence[torch.Tensor | None]) -> None:
        """Writes the rows of a micro-batch.

        Args:
            place: the place of these rows.
            tensors: tensors without a graph, or None.

        Raises:
            ValueError: a tensor, such as a mask, exists for some micro-batches only.
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
        """The rows of a micro-batch in some tensors, trimmed to the micro-batch's length.

        Args:
            place: the place of these rows.
            tensors: tensors in the shapes of the property `tensors`, or None.
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
