"""Sorts the rows of a batch by length and packs them, so that little padding is computed.

The gradient of a window is a weighted sum over rows. So the order of rows does not change it, nor
does the choice of rows that share a micro-batch.
"""

import numbers
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from virtualbatch.window.gather import gathered, is_known, on_host
from virtualbatch.window.padding import (
    length_by_shape,
    padded_length,
    trimmed_as_told,
    trimmed_by_shape,
)
from virtualbatch.window.row_list import RowList, stranger
from virtualbatch.window.tree import builder, common_rows, with_row_lists
from virtualbatch.window.window import Window

_SHARED = (numbers.Number, str, bytes, type(None))


class Piece(NamedTuple):
    """One micro-batch of sorted rows.

    Fields:
        start: its first row in sorted order.
        stop: the row after its last one.
        length: the length to which its rows are trimmed.
    """

    start: int
    stop: int
    length: int


def pack(
    batch: Any,
    lengths: Any,
    *,
    microbatch_tokens: int,
    round_to: int | None = None,
    padded: Any = None,
) -> Window:
    """Cuts a padded batch into micro-batches of rows that are about equally long.

    Rows are sorted by length, longest first, and every micro-batch is trimmed to its longest row.
    The gradient is that of the padded batch, as long as padding reaches no valid row: see
    docs/guides/packing.md.

    Args:
        batch: nested dicts, lists, tuples and dataclasses of arrays (NumPy, PyTorch, TensorFlow or
            JAX) that share their leading axis, the rows. Lists as long as the batch follow them.
        lengths: length of each row, integers >= 1 in an array or a list.
        microbatch_tokens: the largest product of rows and longest row in a micro-batch. A row that
            is longer than this becomes a micro-batch of its own, with a warning.
        round_to: for engines that compile a program for each shape. Lengths are rounded up to
            multiples of it, and all micro-batches but the last have the same number of rows: as
            many as fit at the padded length. None packs as many rows as fit, whatever the shapes.
        padded: which leaves are padded on their second axis, as the same structure of booleans.
            None takes the leaves whose second axis is the padded length: integer and boolean
            leaves, and float leaves of two axes.

    Returns:
        A `Window`, for any engine.

    Raises:
        ValueError: there is not one length per row, or a length is below 1 or exceeds the padded
            axis; no leaf is padded, or it is unclear which are; arrays differ in rows or have none;
            or a size is not a positive integer.
        TypeError: lengths are not integers, or a leaf is neither an array of a known framework nor
            text, a number or a list of these.

    Source:
        The law in docs/how_it_works/law.md.

    Example:
        >>> ids = np.array([[5, 6, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4], [8, 9, 0, 0]])
        >>> window = pack({"ids": ids}, [2, 1, 4, 2], microbatch_tokens=6)
        >>> [microbatch["ids"].tolist() for microbatch in window]
        [[[1, 2, 3, 4]], [[5, 6], [8, 9], [7, 0]]]
    """
    check_tokens(microbatch_tokens, round_to)
    # Narrow NumPy integers would overflow.
    microbatch_tokens = int(microbatch_tokens)
    round_to = None if round_to is None else int(round_to)
    found: list[tuple[str, Any]] = []
    build = builder(batch, "batch", found)
    arrays = [(path, leaf) for path, leaf in found if _is_array(path, leaf)]
    rows = common_rows(arrays)
    if rows is None:
        raise ValueError(
            "The number of rows must be known. Got a batch whose rows a trace leaves open. "
            "Call pack outside of tf.function."
        )
    marked = with_row_lists([leaf for _, leaf in found], rows)
    found = [(path, leaf) for (path, _), leaf in zip(found, marked, strict=True)]
    values = row_lengths(lengths, rows)
    longest = int(values.max())
    if padded is None:
        trimmed = trimmed_by_shape(arrays, length_by_shape(arrays, longest))
    else:
        trimmed = trimmed_as_told(found, padded)
    length = padded_length(arrays, trimmed, longest)
    order = np.argsort(-values, kind="stable")
    pieces = token_cut(values[order].tolist(), microbatch_tokens, length, round_to)
    return Window(
        (
            build([_piece(path, leaf, order, piece, trimmed) for path, leaf in found])
            for piece in pieces
        ),
        sorted_rows=True,
    )


def check_tokens(microbatch_tokens: Any, round_to: Any = None) -> None:
    """Checks the sizes of packed micro-batches.

    Raises:
        ValueError: a size is not a positive integer.
    """
    sizes = [("microbatch_tokens", microbatch_tokens, "of tokens that fit in memory at once")]
    if round_to is not None:
        sizes.append(("round_to", round_to, "whose multiples lengths are rounded up to"))
    for name, value, meaning in sizes:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or int(value) < 1:
            raise ValueError(
                f"{name} must be a positive integer. Got {name}={value!r}. "
                f"Pass the number {meaning}."
            )


def token_cut(
    lengths: Sequence[int], microbatch_tokens: int, most: int, round_to: int | None
) -> list[Piece]:
    """Cuts sorted rows by a budget of tokens.

    Pieces follow each other and cover all rows. No piece is trimmed below its longest row. Rows
    times length exceed the budget only for a single row.

    Args:
        lengths: the lengths of the rows, longest first.
        microbatch_tokens: the budget.
        most: the length to which all rows are padded. Lengths are not rounded up beyond it.
        round_to: see `pack`.
    """
    pieces: list[Piece] = []
    start = 0
    while start < len(lengths):
        length = rounded(lengths[start], round_to, most)
        # Few programs are compiled if only the trimmed length differs.
        size = max(1, microbatch_tokens // (length if round_to is None else most))
        stop = min(start + size, len(lengths))
        pieces.append(Piece(start, stop, length))
        start = stop
    if pieces[0].length > microbatch_tokens:
        warnings.warn(
            "A row that is longer than microbatch_tokens is a micro-batch of its own. Got a row of "
            f"{pieces[0].length} with microbatch_tokens={microbatch_tokens}. "
            "Truncate such rows, or allow more tokens.",
            stacklevel=3,
        )
    return pieces


def rounded(length: int, round_to: int | None, most: int) -> int:
    """A length rounded up to a multiple, but no longer than the padded rows."""
    return length if round_to is None else min(-(-length // round_to) * round_to, most)


def row_lengths(lengths: Any, rows: int) -> np.ndarray:
    """Lengths as int64 in NumPy.

    Args:
        lengths: one per row, in an array or a list.
        rows: rows of the batch.

    Raises:
        ValueError: there is not one length per row, a length is below 1, or the lengths are
            traced.
        TypeError: the lengths are not integers.
    """
    lengths = on_host(lengths)
    if lengths.ndim != 1 or len(lengths) != rows:
        raise ValueError(
            "lengths must hold one length per row. "
            f"Got lengths of shape {lengths.shape} for {rows} rows. "
            "Pass for example mask.sum(1)."
        )
    if lengths.dtype.kind not in "iu":
        raise TypeError(
            f"lengths must be integers. Got lengths of dtype {lengths.dtype}. "
            "Cast them, for example by .astype(int)."
        )
    # In int64, an unsigned difference that wrapped around below zero is negative again.
    whole: np.ndarray = lengths.astype(np.int64)
    if whole.min() < 1:
        row = int(whole.argmin())
        raise ValueError(
            "A length must be at least 1. "
            f"Got lengths[{row}]={whole[row]}. Give rows that hold nothing the length 1."
        )
    return whole


def _is_array(path: str, leaf: Any) -> bool:
    """Whether a leaf has rows. Raises if it can be neither sorted nor shared by all rows."""
    if is_known(leaf):
        return True
    odd = stranger(leaf, _SHARED)
    if odd is not None:
        raise TypeError(
            "pack sorts dense arrays of NumPy, PyTorch, TensorFlow and JAX. "
            f"Got {path} of type {type(odd).__name__}. Convert it, for example by np.asarray, or "
            "pass it to the loss function by a closure."
        )
    return False


def _piece(path: str, leaf: Any, order: np.ndarray, piece: Piece, trimmed: set[str]) -> Any:
    """The part of a leaf that belongs to a micro-batch."""
    chosen = order[piece.start : piece.stop]
    if is_known(leaf):
        return gathered(leaf, chosen, piece.length if path in trimmed else None)
    return leaf.chosen(chosen) if isinstance(leaf, RowList) else leaf
