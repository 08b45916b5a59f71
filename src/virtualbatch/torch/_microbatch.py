"""One micro-batch: its rows of each leaf, and how to build the structure that a loss takes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from virtualbatch.window.row_list import RowList
from virtualbatch.window.tree import Builder


class Microbatch(NamedTuple):
    """One micro-batch of a window.

    Fields:
        rows: its rows; a Python int, or None where a weight says what it counts and its rows
            cannot be told.
        leaves: its pieces of the batch's leaves, where the batch is; tensors are views. Lists with
            one entry per row are marked as such.
        build: leaves -> the structure that the loss function takes.
        given: the structure itself where the caller gave it as it is, else None.
        places: the expressions that reach the leaves in the structure.
    """

    rows: int | None
    leaves: Sequence[Any]
    build: Builder
    given: Any = None
    places: tuple[str, ...] = ()

    def get(self) -> Any:
        """The structure. What was cut is built anew each time, so that it may be taken apart."""
        return self.build(self.leaves) if self.given is None else self.given

    def some(self, rows: Sequence[int]) -> "Microbatch":
        """Copies of some of its rows, given by their numbers."""
        numbers = torch.as_tensor(rows)

        def chosen(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return leaf.index_select(0, numbers.to(leaf.device))
            return leaf.chosen(rows) if isinstance(leaf, RowList) else leaf

        return self._replace(rows=len(rows), leaves=list(map(chosen, self.leaves)), given=None)

    def mapped(self, fn: Callable[[torch.Tensor], Any]) -> Any:
        """The structure with fn applied to every tensor where the batch is."""
        return self.build([fn(x) if isinstance(x, torch.Tensor) else x for x in self.leaves])

    def with_rows(self, rows: int, fn: Callable[[torch.Tensor], Any]) -> Any:
        """As `mapped`, where fn gives that many rows, with lists of as many entries."""
        leaves = [x.stretched(rows) if isinstance(x, RowList) else x for x in self.leaves]
        return self._replace(leaves=leaves).mapped(fn)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors with the expressions that reach them in `batch`."""
        pairs = zip(self.places, self.leaves, strict=True)
        return [(f"batch{place}", x) for place, x in pairs if isinstance(x, torch.Tensor)]

    def in_words(self) -> list[str]:
        """Its leaves in words."""
        return [
            f"microbatch{place} "
            + ("a tensor" if isinstance(x, torch.Tensor) else f"of type {type(x).__name__}")
            for place, x in zip(self.places, self.leaves, strict=True)
        ]

    def with_tensors(self, fn: Callable[[torch.Tensor], Any]) -> "Microbatch":
        """The micro-batch with others for its tensors, such as fake ones or clones."""
        leaves = [fn(x) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        return self._replace(leaves=leaves, given=None)

    def protected(self) -> "Microbatch":
        """The micro-batch with clones of its tensors, made anew each time that it is asked for.

        Whatever a loss function does to its rows in place, those of the caller stay as they are.
        """
        build = self.build

        def cloned(leaf: Any) -> Any:
            return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf

        return self._replace(build=lambda leaves: build(list(map(cloned, leaves))), given=None)


def on_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The micro-batch with its host tensors copied to a device, each time that it is asked for.

    Copies from pinned memory do not wait for the device.

    Args:
        microbatch: a micro-batch.
        device: where to.
    """
    build = microbatch.build

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, torch.nn.utils.rnn.PackedSequence):
            return leaf.to(device, non_blocking=leaf.is_pinned()) if leaf.data.is_cpu else leaf
        on_host = isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"
        return leaf.to(device, non_blocking=_is_pinned(leaf)) if on_host else leaf

    return microbatch._replace(build=lambda leaves: build(list(map(copied, leaves))), given=None)


def most_rows(cut: Sequence[Microbatch]) -> int:
    """Rows of the largest of some micro-batches whose rows are known."""
    return max(map(known_rows, cut))


def known_rows(microbatch: Microbatch) -> int:
    """Rows of a micro-batch that has some."""
    if microbatch.rows is None:
        raise ValueError("internal: what has no rows is cut.")
    return microbatch.rows


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its rows on its first axis."""
    # Nested tensors may be called strided.
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_pinned(tensor: torch.Tensor) -> bool:
    return is_dense(tensor) and tensor.is_pinned()
