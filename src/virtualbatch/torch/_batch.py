"""A batch as micro-batches: nested structures of tensors, cut by rows without copying them.

A structure is read once per call: its leaves are found and checked, then cut as often as need be.
A micro-batch is built of its pieces when it is asked for. Where the batch is on the host and the
model on a device, that is when it is copied there.
"""

import numbers
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch

from virtualbatch.window.cut import even_cut, rows_per_microbatch
from virtualbatch.window.tree import Builder, builder, common_rows, is_text
from virtualbatch.window.window import Window, check_alike, check_window

_SHARED = (numbers.Number, str, bytes, Enum, torch.dtype, torch.device, torch.Generator, type(None))

# A PackedSequence is a tuple, but its data has the rows in another order.
_ONE_LEAF = (torch.Tensor, torch.nn.utils.rnn.PackedSequence)


class Microbatch(NamedTuple):
    """One micro-batch of a window.

    Fields:
        rows: its rows; a Python int.
        leaves: its pieces of the batch's leaves, where the batch is; tensors are views.
        build: leaves -> the structure that the loss function takes.
        given: the structure itself where the caller gave it as it is, else None.
        places: the expressions that reach the leaves in the structure.
    """

    rows: int
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
            if is_text(leaf) and len(leaf) == self.rows:
                return [leaf[row] for row in rows]
            return leaf

        return self._replace(rows=len(rows), leaves=list(map(chosen, self.leaves)), given=None)

    def mapped(self, fn: Callable[[torch.Tensor], Any]) -> Any:
        """The structure with fn applied to every tensor where the batch is."""
        return self.build([fn(x) if isinstance(x, torch.Tensor) else x for x in self.leaves])

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


class ReadBatch(NamedTuple):
    """A batch or a Window whose structure has been read.

    Fields:
        given: its micro-batches as they came: those of a Window, or the whole batch as one.
        is_window: which of the two.
    """

    given: list[Microbatch]
    is_window: bool

    @property
    def whole(self) -> Microbatch:
        """The batch as one micro-batch; not of a Window."""
        (whole,) = self.given
        return whole

    def protected(self) -> "ReadBatch":
        """The batch whose micro-batches give clones of their tensors away."""
        return self._replace(given=[microbatch.protected() for microbatch in self.given])

    def cut(
        self,
        microbatch_size: int | None,
        accumulation_steps: int | None,
        most: int | None = None,
    ) -> list[Microbatch]:
        """Cuts a batch evenly, or takes a Window as it is cut.

        Args:
            microbatch_size: checked rows of one micro-batch, or None; None for a Window.
            accumulation_steps: checked micro-batches per window, or None; None for a Window.
            most: rows that no micro-batch may exceed, those of a Window neither; None for any.

        Returns:
            The micro-batches in row order. Sizes differ by at most one row, unless a Window says
            otherwise.

        Raises:
            ValueError: the two sizes disagree.
        """
        if not self.is_window:
            size = rows_per_microbatch(self.whole.rows, microbatch_size, accumulation_steps)
            return _cut(self.whole, size if most is None else min(size, most))
        if most is None:
            return self.given
        return [piece for microbatch in self.given for piece in _cut(microbatch, most)]


def read(batch: Any) -> ReadBatch:
    """Reads the structure of a batch.

    Args:
        batch: nested structure of tensors that share their leading axis, or a Window of such.

    Raises:
        ValueError: rows differ or are missing, or a window is empty or holds micro-batches of
            different structures.
        TypeError: an array is not a dense tensor of PyTorch, or a leaf cannot be cut.
    """
    if not isinstance(batch, Window):
        return ReadBatch([_uncut(batch, "batch")], is_window=False)
    check_window(batch)
    found = [_uncut(given, f"window[{index}]") for index, given in enumerate(batch)]
    check_alike([microbatch.in_words() for microbatch in found])
    return ReadBatch(found, is_window=True)


def _cut(uncut: Microbatch, size: int) -> list[Microbatch]:
    cut = even_cut(uncut.rows, size)
    if len(cut) == 1:
        return [uncut]
    columns = [_pieces(leaf, uncut.rows, cut) for leaf in uncut.leaves]
    return [
        Microbatch(stop - start, leaves, uncut.build, places=uncut.places)
        for (start, stop), leaves in zip(cut, zip(*columns, strict=True), strict=True)
    ]


def on_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The micro-batch with its host tensors copied to a device, each time that it is asked for.

    Copies from pinned memory do not wait for the device.

    Args:
        microbatch: a micro-batch.
        device: where to.
    """
    build = microbatch.build

    def copied(leaf: Any) -> Any:
        on_host = isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"
        return leaf.to(device, non_blocking=leaf.is_pinned()) if on_host else leaf

    return microbatch._replace(build=lambda leaves: build(list(map(copied, leaves))), given=None)


def _uncut(structure: Any, path: str) -> Microbatch:
    found: list[tuple[str, Any]] = []
    build = builder(structure, path, found, _ONE_LEAF)
    rows = common_rows([(place, leaf) for place, leaf in found if _is_tensor(place, leaf)])
    if rows is None:
        raise ValueError("internal: a tensor has no number of rows.")
    places = tuple(place.removeprefix(path) for place, _ in found)
    return Microbatch(rows, [leaf for _, leaf in found], build, structure, places)


def _pieces(leaf: Any, rows: int, cut: Sequence[tuple[int, int]]) -> Sequence[Any]:
    """What each micro-batch has of a leaf: its rows, or all of what belongs to every row."""
    if isinstance(leaf, torch.Tensor):
        # Slices, all in one call.
        return leaf.tensor_split([stop for _, stop in cut[:-1]])
    if is_text(leaf) and len(leaf) == rows:
        return [leaf[start:stop] for start, stop in cut]
    return [leaf] * len(cut)


def _is_tensor(path: str, leaf: Any) -> bool:
    """Whether a leaf has rows; refuses what can neither be cut nor belong to every row."""
    if isinstance(leaf, torch.Tensor):
        if leaf.layout != torch.strided or leaf.is_nested:
            kind = "nested tensor" if leaf.is_nested else f"tensor of layout {leaf.layout}"
            raise TypeError(
                f"Tensors of a batch must be dense. Got a {kind} in {path}. "
                "Pass a Window whose micro-batches you cut yourself."
            )
        return True
    if hasattr(leaf, "shape"):
        raise TypeError(
            "Arrays of a batch must be tensors of PyTorch. "
            f"Got {path} of type {type(leaf).__name__}. Pass torch.as_tensor({path})."
        )
    if not isinstance(leaf, _SHARED) and not is_text(leaf):
        raise TypeError(
            "A batch must be made of tensors, mappings, lists, tuples, dataclasses, numbers and "
            f"text. Got {path} of type {type(leaf).__name__}. "
            "Pass its tensors instead, or pass it to the loss function by a closure."
        )
    return False
