"""A batch as micro-batches: nested structures of tensors, cut by rows without copying them.

A structure is read once per call. Its leaves are found and checked, then cut as often as needed.
A micro-batch is built from its pieces only when it runs. If the batch is on the host and the model
on a device, the pieces are copied at that moment.
"""

import numbers
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch

from virtualbatch.torch._microbatch import Microbatch, is_dense, known_rows
from virtualbatch.window.cut import even_cut, even_parts, rows_per_microbatch
from virtualbatch.window.row_list import RowList, is_sequence, stranger
from virtualbatch.window.tree import (
    Builder,
    builder,
    common_rows,
    rows_if_shared,
    with_row_lists,
)
from virtualbatch.window.window import PASS_WEIGHT, Window, check_alike, check_window

# Classes of what belongs to every row.
SHARED = (numbers.Number, str, bytes, Enum, torch.dtype, torch.device, torch.Generator, type(None))

# A PackedSequence is a tuple, but its data has the rows in another order.
ONE_LEAF = (torch.Tensor, torch.nn.utils.rnn.PackedSequence)


class ReadBatch(NamedTuple):
    """A batch or a Window whose structure has been read.

    Fields:
        given: the micro-batches of a Window, or the whole batch as one micro-batch.
        is_window: whether the caller gave a Window.
        without_rows: the content of a batch without rows; None for every other batch.
    """

    given: list[Microbatch]
    is_window: bool
    without_rows: Microbatch | None = None

    @property
    def can_be_cut(self) -> bool:
        """Whether the rows of all micro-batches are known."""
        return all(microbatch.rows is not None for microbatch in self.given)

    @property
    def whole(self) -> Microbatch:
        """The batch as one micro-batch. Not for a Window."""
        (whole,) = self.given
        return whole

    def protected(self) -> "ReadBatch":
        """This batch, with micro-batches that hand out clones of their tensors."""
        return self._replace(given=[microbatch.protected() for microbatch in self.given])

    def refuse_graphs(self, count: int) -> None:
        """Refuses rows that carry one graph into several micro-batches.

        The first backward pass would use that graph up. Each micro-batch of a Window may bring a
        graph of its own.

        Args:
            count: the number of micro-batches of the window.

        Raises:
            ValueError: a tensor was computed with gradients recorded.
        """
        if self.is_window or count < 2 or not torch.is_grad_enabled():
            return
        for place, tensor in self.whole.tensors():
            if tensor.grad_fn is not None:
                raise ValueError(
                    "Rows must carry no graph: the first micro-batch would use it up. Got "
                    f"{place} with grad_fn={type(tensor.grad_fn).__name__}, computed before the "
                    "call. Compute it inside loss_fn, or detach() it if nothing that it depends "
                    "on is trained."
                )

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
            most: the most rows that a micro-batch may have, also in a Window; None for no limit.

        Returns:
            The micro-batches in row order. Sizes differ by at most one row, unless a Window says
            otherwise.

        Raises:
            ValueError: the two sizes disagree.
        """
        if not self.is_window:
            size = rows_per_microbatch(known_rows(self.whole), microbatch_size, accumulation_steps)
            size = size if most is None else min(size, most)
            return _cut(self.whole, even_cut(known_rows(self.whole), size))
        if most is None:
            return self.given
        return [
            piece
            for microbatch in self.given
            for piece in _cut(microbatch, even_cut(known_rows(microbatch), most))
        ]

    def cut_into(self, count: int) -> list[Microbatch]:
        """Cuts a batch into a number of micro-batches, or into its rows if there are fewer.

        Args:
            count: the number of micro-batches, at least 1. Not for a Window.
        """
        rows = known_rows(self.whole)
        return _cut(self.whole, even_parts(rows, min(count, rows)))


def read(batch: Any, weighted: bool = False) -> ReadBatch:
    """Reads the structure of a batch.

    Args:
        batch: nested structure of tensors that share their leading axis, or a Window of such.
        weighted: whether a weight says what a micro-batch counts. Then the rows of a Window need
            not be known. If they are not known, its micro-batches need not be alike.

    Raises:
        ValueError: rows differ or are missing, or a window is empty or holds micro-batches of
            different structures.
        TypeError: an array is not a dense tensor of PyTorch, or a leaf cannot be cut.
    """
    if not isinstance(batch, Window):
        return ReadBatch([_uncut(batch, "batch")], is_window=False)
    check_window(batch)
    if weighted:
        found = [_as_it_is(given, f"window[{index}]") for index, given in enumerate(batch)]
        if any(microbatch.rows is None for microbatch in found):
            # If one micro-batch has no common rows, the rows of the others may agree by chance.
            # So none of them is cut.
            return ReadBatch([microbatch._replace(rows=None) for microbatch in found], True)
    else:
        found = [_uncut(given, f"window[{i}]", PASS_WEIGHT) for i, given in enumerate(batch)]
    check_alike([microbatch.in_words() for microbatch in found])
    return ReadBatch(found, is_window=True)


def read_without_rows(batch: Any) -> ReadBatch | None:
    """Reads an empty Window, or a batch whose tensors all have zero rows.

    Returns:
        None if it is something else.
    """
    if isinstance(batch, Window):
        return None if len(batch) else ReadBatch([], is_window=True)
    found: list[tuple[str, Any]] = []
    build = builder(batch, "batch", found, ONE_LEAF)
    leaves = [leaf for _, leaf in found]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or any(x.dim() == 0 or x.shape[0] for x in tensors):
        return None
    return ReadBatch([], is_window=False, without_rows=Microbatch(0, leaves, build))


def _cut(uncut: Microbatch, cut: Sequence[tuple[int, int]]) -> list[Microbatch]:
    if len(cut) == 1:
        return [uncut]
    columns = [_pieces(leaf, cut) for leaf in uncut.leaves]
    return [
        Microbatch(stop - start, leaves, uncut.build, places=uncut.places)
        for (start, stop), leaves in zip(cut, zip(*columns, strict=True), strict=True)
    ]


def _uncut(structure: Any, path: str, or_else: str = "") -> Microbatch:
    found: list[tuple[str, Any]] = []
    build = builder(structure, path, found, ONE_LEAF)
    tensors = [(place, leaf) for place, leaf in found if _is_tensor(place, leaf, or_else)]
    rows = common_rows(tensors, or_else)
    if rows is None:
        raise ValueError("internal: a tensor has no number of rows.")
    for place, leaf in found:
        if is_sequence(leaf) and len(leaf) != rows:
            _refuse_strangers(place, leaf, or_else)
    return _read(structure, path, found, build, rows)


def _as_it_is(structure: Any, path: str) -> Microbatch:
    """A micro-batch of a Window, with its rows if they can be told."""
    found: list[tuple[str, Any]] = []
    build = builder(structure, path, found, ONE_LEAF)
    rows = rows_if_shared([(place, x) for place, x in found if isinstance(x, torch.Tensor)])
    for _, leaf in found:
        plain = isinstance(leaf, SHARED) or is_sequence(leaf)
        if not (plain or (isinstance(leaf, torch.Tensor) and is_dense(leaf))):
            rows = None
    return _read(structure, path, found, build, rows)


def _read(
    structure: Any, path: str, found: Sequence[tuple[str, Any]], build: Builder, rows: int | None
) -> Microbatch:
    places = tuple(place.removeprefix(path) for place, _ in found)
    leaves = [leaf for _, leaf in found]
    if rows is not None:
        leaves = with_row_lists(leaves, rows)
    return Microbatch(rows, leaves, build, structure, places)


def _pieces(leaf: Any, cut: Sequence[tuple[int, int]]) -> Sequence[Any]:
    """The part of a leaf for each micro-batch: its rows, or the whole leaf if it has no rows."""
    if isinstance(leaf, torch.Tensor):
        # All slices in one call.
        return leaf.tensor_split([stop for _, stop in cut[:-1]])
    if isinstance(leaf, RowList):
        return [leaf.cut(start, stop) for start, stop in cut]
    return [leaf] * len(cut)


def _refuse_strangers(path: str, leaf: Any, or_else: str) -> None:
    """Refuses an object that would belong to every row and may hide tensors."""
    odd = stranger(leaf, SHARED)
    if odd is not None:
        raise TypeError(
            "A batch must be made of tensors, mappings, lists, tuples, dataclasses, numbers and "
            f"text. Got {path} of type {type(odd).__name__}. "
            f"Pass its tensors instead, or pass it to the loss function by a closure.{or_else}"
        )


def _is_tensor(path: str, leaf: Any, or_else: str) -> bool:
    """Whether a leaf has rows. Refuses a leaf that can neither be cut nor belong to every row."""
    if isinstance(leaf, torch.Tensor):
        if not is_dense(leaf):
            kind = "nested tensor" if leaf.is_nested else f"tensor of layout {leaf.layout}"
            raise TypeError(
                f"Tensors of a batch must be dense. Got a {kind} in {path}. "
                f"Pass a Window whose micro-batches you cut yourself, and weight=.{or_else}"
            )
        return True
    if hasattr(leaf, "shape"):
        raise TypeError(
            "Arrays of a batch must be tensors of PyTorch. "
            f"Got {path} of type {type(leaf).__name__}. Pass torch.as_tensor({path}).{or_else}"
        )
    if not is_sequence(leaf):
        _refuse_strangers(path, leaf, or_else)
    return False
