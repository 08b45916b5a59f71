"""One micro-batch: its rows of each leaf, and how to build the structure for the loss."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from virtualbatch.window.row_list import RowList
from virtualbatch.window.tree import Builder


class Microbatch(NamedTuple):
    """One micro-batch of a window.

    Fields:
        rows: the number of rows, a Python int. None if the rows are not known; then a weight says
            what the micro-batch counts.
        leaves: its pieces of the batch's leaves, on the device of the batch. Tensors are views.
            Lists with one entry per row are marked as such.
        build: leaves -> the structure that the loss function takes.
        given: the structure itself if the caller gave it uncut, else None.
        places: the expressions that reach the leaves in the structure.
    """

    rows: int | None
    leaves: Sequence[Any]
    build: Builder
    given: Any = None
    places: tuple[str, ...] = ()

    def get(self) -> Any:
        """The structure. A cut one is built anew each time, so the loss function may change it."""
        return self.build(self.leaves) if self.given is None else self.given

    def some(self, rows: Sequence[int]) -> "Microbatch":
        """A micro-batch of copies of some rows, given by their numbers."""
        numbers = torch.as_tensor(rows)

        def chosen(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return leaf.index_select(0, numbers.to(leaf.device))
            return leaf.chosen(rows) if isinstance(leaf, RowList) else leaf

        return self._replace(rows=len(rows), leaves=list(map(chosen, self.leaves)), given=None)

    def mapped(self, fn: Callable[[torch.Tensor], Any]) -> Any:
        """The structure with fn applied to every tensor, on the device of the batch."""
        return self.build([fn(x) if isinstance(x, torch.Tensor) else x for x in self.leaves])

    def with_rows(self, rows: int, fn: Callable[[torch.Tensor], Any]) -> Any:
        """The structure with another number of rows.

        Args:
            rows: the number of rows. Lists get as many entries.
            fn: tensor -> a tensor with that many rows.
        """
        leaves = [x.stretched(rows) if isinstance(x, RowList) else x for x in self.leaves]
        return self._replace(leaves=leaves).mapped(fn)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors with the expressions that reach them in `batch`."""
        pairs = zip(self.places, self.leaves, strict=True)
        return [(f"batch{place}", x) for place, x in pairs if isinstance(x, torch.Tensor)]

    def in_words(self) -> list[str]:
        """A description of each leaf."""
        return [
            f"microbatch{place} "
            + ("a tensor" if isinstance(x, torch.Tensor) else f"of type {type(x).__name__}")
            for place, x in zip(self.places, self.leaves, strict=True)
        ]

    def with_tensors(self, fn: Callable[[torch.Tensor], Any]) -> "Microbatch":
        """The micro-batch with its tensors replaced, such as by fake ones or clones."""
        leaves = [fn(x) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        return self._replace(leaves=leaves, given=None)

    def protected(self) -> "Microbatch":
        """The micro-batch with clones of its tensors, made anew in each `get`.

        If a loss function changes its rows in place, the caller's rows stay as they are.
        """
        build = self.build

        def cloned(leaf: Any) -> Any:
            return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf

        return self._replace(build=lambda leaves: build(list(map(cloned, leaves))), given=None)


def on_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The micro-batch with its host tensors copied to a device, in each `get`.

    Copies from pinned memory do not wait for the device.

    Args:
        microbatch: a micro-batch.
        device: the target device.
    """
    build = microbatch.build

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, torch.nn.utils.rnn.PackedSequence):
            return leaf.to(device, non_blocking=leaf.is_pinned()) if leaf.data.is_cpu else leaf
        on_host = isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"
        return leaf.to(device, non_blocking=_is_pinned(leaf)) if on_host else leaf

    return microbatch._replace(build=lambda leaves: build(list(map(copied, leaves))), given=None)


def most_rows(cut: Sequence[Microbatch]) -> int:
    """The rows of the largest micro-batch. All rows must be known."""
    return max(map(known_rows, cut))


def known_rows(microbatch: Microbatch) -> int:
    """The rows of a micro-batch whose rows are known."""
    if microbatch.rows is None:
        raise ValueError("internal: what has no rows is cut.")
    return microbatch.rows


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its rows on its first axis."""
    # Nested tensors may have the layout strided.
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_pinned(tensor: torch.Tensor) -> bool:
    return is_dense(tensor) and tensor.is_pinned()
