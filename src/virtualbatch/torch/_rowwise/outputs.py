"""Joins what fn returns for micro-batches. Rows are copied, graphs are not kept."""

from collections.abc import Sequence
from typing import Any

import torch

from virtualbatch.torch._batch import ONE_LEAF
from virtualbatch.window.entries import check_entries, check_same_structure
from virtualbatch.window.tree import Builder, builder


class Outputs:
    """The outputs of all rows.

    Args:
        rows: the number of rows.

    Attributes:
        leaves: tensors with one entry per row, and None where fn returns None.
        takes: for each leaf, whether it has a gradient in some micro-batch.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._start = 0
        self._kinds: list[str] = []
        self._build: Builder | None = None
        self.leaves: list[torch.Tensor | None] = []
        self.takes: list[bool] = []

    @torch.no_grad()
    def add(self, outputs: Sequence[tuple[str, Any]], build: Builder, rows: int) -> None:
        """Copies the outputs of the next micro-batch.

        Args:
            outputs: the leaves, each with the expression that reaches it.
            build: leaves -> the structure that fn returned.
            rows: the rows of the micro-batch.

        Raises:
            ValueError: a leaf has not one entry per row, or the structure differs from that of the
                first micro-batch.
            TypeError: a leaf is no tensor.
        """
        check_outputs(outputs, rows)
        kinds = kinds_of(outputs)
        if self._build is None:
            self._kinds = kinds
            self.leaves = [_room(leaf, self._rows) for _, leaf in outputs]
            self.takes = [False] * len(outputs)
            # The builder of the first micro-batch may hold its outputs and so its graph.
            self._build = builder(build(self.leaves), "output", [], ONE_LEAF, lists=False)
        check_same_structure(self._kinds, kinds)
        stop = self._start + rows
        for k, (_, leaf) in enumerate(outputs):
            room = self.leaves[k]
            if room is not None:
                room[self._start : stop].copy_(leaf)
                self.takes[k] |= leaf.requires_grad
        self._start = stop

    def structure(self, leaves: Sequence[torch.Tensor | None]) -> Any:
        """What fn would have returned for the whole batch.

        Args:
            leaves: the leaves of all rows.
        """
        if self._build is None:
            raise ValueError("internal: there was no micro-batch.")
        return self._build(leaves)


def check_outputs(outputs: Sequence[tuple[str, Any]], rows: int) -> None:
    """Refuses outputs that have not one entry per row.

    Args:
        outputs: the leaves, each with the expression that reaches it.
        rows: the rows of the micro-batch.

    Raises:
        ValueError: a leaf has another number of entries.
        TypeError: a leaf is no tensor.
    """
    check_entries(
        [(place, x) for place, x in outputs if isinstance(x, torch.Tensor) or x is None], rows
    )
    # Arrays of other libraries also have a shape, but no gradient.
    for place, leaf in outputs:
        if leaf is not None and not isinstance(leaf, torch.Tensor):
            raise TypeError(
                "What fn returns must be tensors with one entry per row, or None. "
                f"Got {place} of type {type(leaf).__name__}. "
                "Return it from a function of its own, or compute it outside."
            )


def kinds_of(outputs: Sequence[tuple[str, Any]]) -> list[str]:
    """The structure of outputs in words, which differ if structures differ."""
    return [_kind(place, leaf) for place, leaf in outputs]


def _kind(place: str, leaf: torch.Tensor | None) -> str:
    if leaf is None:
        return f"{place} is None"
    return f"{place} {str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape[1:])}"


def _room(leaf: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    return None if leaf is None else leaf.new_empty((rows, *leaf.shape[1:]))
