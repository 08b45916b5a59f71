"""The outputs of a function of rows: a structure of tensors with one entry per row."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._arrays import after, count_rows, named_arrays
from virtualbatch.window.entries import check_entries, check_same_structure
from virtualbatch.window.tree import Builder, builder, rows_if_shared


class Outputs:
    """The structure that every micro-batch's outputs must have, taken from the first micro-batch.

    Args:
        places: the structure as `places_of` gives it, if it is known before.

    Attributes:
        takes_gradient: for each tensor of the outputs, whether it can have a gradient.
    """

    def __init__(self, places: Sequence[str] | None = None) -> None:
        self._build: Builder | None = None
        self._places: list[str] | None = None if places is None else list(places)
        self.takes_gradient: list[bool] = []

    def tensors(self, found: Any, microbatch: Any) -> list[Any]:
        """The outputs for a micro-batch as a flat list of tensors, without Nones.

        Raises:
            ValueError: an output has not one entry per row, or the structure differs from the first
                one.
            TypeError: an output is no dense tensor.
        """
        leaves: list[tuple[str, Any]] = []
        build = builder(found, "output", leaves, lists=False)
        is_open = check_outputs(leaves, rows_if_shared(named_arrays(microbatch)))
        places = places_of(leaves)
        if self._build is None:
            self._build = build
        if self._places is None:
            self._places = places
        check_same_structure(self._places, places)
        tensors = [tf.convert_to_tensor(leaf) for _, leaf in leaves if leaf is not None]
        self.takes_gradient = [takes_gradient(x.dtype) for x in tensors]
        if is_open:
            tensors = after([_one_entry_per_row(x, microbatch) for x in tensors], tensors)
        return tensors

    def structure(self, tensors: Sequence[Any]) -> Any:
        """The structure of the outputs, built of tensors in the order of `tensors`."""
        if self._build is None or self._places is None:
            raise RuntimeError("internal: no micro-batch has run.")
        given = iter(tensors)
        return self._build(
            [None if place.endswith(" is None") else next(given) for place in self._places]
        )


def places_of(leaves: Sequence[tuple[str, Any]]) -> list[str]:
    """The structure of outputs in words, which differ if structures differ."""
    return [f"{place} is None" if leaf is None else place for place, leaf in leaves]


def check_outputs(leaves: Sequence[tuple[str, Any]], rows: int | None) -> bool:
    """Refuses outputs by their shapes, as far as a trace knows them.

    Args:
        leaves: the leaves of the outputs, each with the expression that reaches it.
        rows: the rows of the micro-batch; None if a trace does not know them.

    Returns:
        Whether some outputs can be checked only at run time.
    """
    for place, leaf in leaves:
        if isinstance(leaf, tf.RaggedTensor | tf.SparseTensor | tf.IndexedSlices):
            raise TypeError(
                f"What fn returns must be dense tensors. Got {place} of type "
                f"{type(leaf).__name__}. Return its to_tensor(), or one entry per row computed "
                "from it."
            )
    known = [(place, leaf) for place, leaf in leaves if not _is_open(leaf, rows)]
    check_entries(known, rows)
    return len(known) < len(leaves)


def takes_gradient(dtype: tf.DType) -> bool:
    """Whether a tensor of this dtype can have a gradient."""
    return bool(dtype.is_floating or dtype.is_complex)


def _is_open(leaf: Any, rows: int | None) -> bool:
    """Whether the number of entries of a leaf, or the number of rows, is known only at run time."""
    shape = getattr(leaf, "shape", None)
    if not isinstance(shape, tf.TensorShape):
        return False
    return shape.rank is None or (shape.rank > 0 and (rows is None or shape[0] is None))


def _one_entry_per_row(tensor: Any, microbatch: Any) -> Any:
    return tf.debugging.Assert(
        tf.equal(tf.shape(tensor)[0], count_rows(microbatch)),
        [
            "What fn returns must have one entry per row. Got shape",
            tf.shape(tensor),
            "for rows",
            count_rows(microbatch),
            "Return one entry per row, and reduce over rows in the loss.",
        ],
    )
