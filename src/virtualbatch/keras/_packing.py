"""Packed batches of `fit`: which arrays are padded, to what length, and which models take them."""

from collections.abc import Callable, Set
from typing import Any, NamedTuple

import keras
from keras.src import backend

from virtualbatch.window.gather import is_known
from virtualbatch.window.packing import check_tokens
from virtualbatch.window.padding import length_by_shape, trimmed_by_shape
from virtualbatch.window.tree import Builder, builder

_FIX = "In a loop of your own, virtualbatch.pack takes padded=, which names the padded leaves."
# The number of lengths to which rows are trimmed, if each length needs a program of its own.
FEW_LENGTHS = 4


class Packing(NamedTuple):
    """How the rows of every batch are packed.

    Fields:
        tokens: the largest product of rows and longest row that a micro-batch may have.
        lengths: x of a batch -> length of each row, integers.
    """

    tokens: int
    lengths: Callable[[Any], Any]


class PaddedBatch(NamedTuple):
    """A batch of `fit` as leaves, some of them padded.

    Fields:
        leaves: the leaves of (x, y, sample_weight).
        trimmed: for each leaf, whether its second axis is padded.
        length: the length to which leaves are padded.
        build: leaves -> (x, y, sample_weight).
        targets: whether some target is padded, so that losses have a value per token.
    """

    leaves: list[Any]
    trimmed: list[bool]
    length: int
    build: Builder
    targets: bool

    def mapped(self, fn: Callable[[Any, bool], Any]) -> Any:
        """(x, y, sample_weight) after fn(array, whether it is padded) is applied to each array."""
        pairs = zip(self.leaves, self.trimmed, strict=True)
        return self.build([fn(leaf, cut) if is_known(leaf) else leaf for leaf, cut in pairs])

    def like(self, batch: Any) -> "PaddedBatch":
        """Another batch of the same structure, such as a micro-batch of this one."""
        found: list[tuple[str, Any]] = []
        builder(batch, "batch", found)
        return self._replace(leaves=[leaf for _, leaf in found])


class _Shape(NamedTuple):
    """Shape and dtype of an array. A length that a trace leaves open is the number `_OPEN`."""

    shape: tuple[int, ...]
    dtype: Any


# Stands for a length that a trace leaves open. It is longer than any row.
_OPEN = 2**62


def asked_packing(microbatch_tokens: Any, lengths: Any) -> Packing | None:
    """How rows are packed, from the arguments of `accumulate`; None if they are not packed.

    Raises:
        ValueError: only one of the two is given, or tokens are not a positive integer.
        TypeError: `lengths` is not a function.
    """
    if microbatch_tokens is None and lengths is None:
        return None
    if microbatch_tokens is None or lengths is None:
        raise ValueError(
            "microbatch_tokens and lengths belong together. "
            f"Got microbatch_tokens={microbatch_tokens!r} and lengths={lengths!r}. "
            "Pass for example lengths=lambda x: keras.ops.sum(x != 0, 1)."
        )
    check_tokens(microbatch_tokens)
    if not callable(lengths):
        raise TypeError(
            f"lengths must be a function of the x of a batch. Got lengths={lengths!r}. "
            "Pass for example lengths=lambda x: keras.ops.sum(x != 0, 1)."
        )
    return Packing(int(microbatch_tokens), lengths)


def padded_batch(model: keras.Model, batch: Any) -> PaddedBatch:
    """The leaves of a batch, and which of them are padded.

    The second axis of x gives the padded length. y and sample weights are padded if their second
    axis has that length too.

    Args:
        model: the model.
        batch: (x, y, sample_weight) of arrays, which may be traced.

    Raises:
        ValueError: it is not clear which arrays are padded, or the model takes one length only.
        TypeError: an array is not dense.
    """
    found: list[tuple[str, Any]] = []
    build = builder(batch, "batch", found)
    for path, leaf in found:
        if hasattr(leaf, "shape") and not is_known(leaf):
            raise TypeError(
                "Arrays of a packed batch must be dense. "
                f"Got {path} of type {type(leaf).__name__}. Pass it padded."
            )
    arrays = [(path, _described(leaf)) for path, leaf in found if is_known(leaf)]
    length = length_by_shape([pair for pair in arrays if pair[0].startswith("batch[0]")], 1, _FIX)
    trimmed = trimmed_by_shape(arrays, length, _FIX)
    _refuse_one_length(model, length)
    return PaddedBatch(
        [leaf for _, leaf in found],
        [path in trimmed for path, _ in found],
        length,
        build,
        any(path.startswith("batch[1]") for path in trimmed),
    )


def trimmed_outputs(model: keras.Model, batch: PaddedBatch) -> list[bool]:
    """For each leaf of the predictions, whether its second axis follows the padded length of x.

    Only shapes are computed. Nothing runs.

    Args:
        model: a model that is built.
        batch: a batch of `fit`.
    """

    def symbol(leaf: Any, trimmed: bool) -> Any:
        shape = (leaf.shape[0], None, *leaf.shape[2:]) if trimmed else leaf.shape
        return keras.KerasTensor(shape, keras.backend.standardize_dtype(leaf.dtype))

    def forward(x: Any) -> Any:
        return model(x, training=False) if model._call_has_training_arg else model(x)

    found = keras.tree.flatten(backend.compute_output_spec(forward, batch.mapped(symbol)[0]))
    return [len(leaf.shape) > 1 and leaf.shape[1] is None for leaf in found]


def checked_lengths(lengths: Any, rows: int | None) -> Any:
    """Returns the lengths after checking, by their shape, that there is one per row.

    Raises:
        ValueError: the shape is another one.
    """
    shape = tuple(getattr(lengths, "shape", ()))
    if len(shape) != 1 or (None not in (shape[0], rows) and shape[0] != rows):
        raise ValueError(
            f"lengths must return one length per row. Got shape {shape} for {rows} rows. "
            "Return for example keras.ops.sum(x != 0, 1)."
        )
    return lengths


def _described(leaf: Any) -> _Shape:
    return _Shape(tuple(_OPEN if n is None else n for n in leaf.shape), leaf.dtype)


def _refuse_one_length(model: keras.Model, length: int) -> None:
    inputs: Set[int] = {
        given.shape[1]
        for given in keras.tree.flatten(getattr(model, "inputs", None) or [])
        if len(given.shape) > 1 and given.shape[1] is not None
    }
    if length in inputs:
        raise ValueError(
            "The rows of a packed micro-batch are trimmed, so the model must take any length. "
            f"Got a model whose input has the length {length}. "
            "Make it with keras.Input((None,))."
        )
