"""Losses that layers add: which are sums over rows, and which are a number that counts once.

Keras adds up whatever array a layer adds. One value per row makes that a sum over rows, to which
each micro-batch gives all of its own. An array of weights, of features or a number is the same for
any rows or a mean over them, so each micro-batch gives its share.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

Shape = tuple[int | None, ...]

# The rows of the two batches whose shapes are compared.
_FEW, _MORE = 2, 3


class AddedLosses:
    """What is known about the losses that the layers of one model add."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], list[bool]] = {}

    def are_sums(
        self, losses: Sequence[Any], shapes: Callable[[int], Sequence[Shape]]
    ) -> list[bool]:
        """For each loss, whether it holds values of rows, which Keras adds up.

        Equal lengths may be a coincidence, so its shape is read for two numbers of rows.

        Args:
            losses: those of a micro-batch, in the order of `model.losses`.
            shapes: rows -> shapes of the losses of so many rows; called twice at the most, and
                never where every loss is a number.

        Raises:
            ValueError: how many losses there are depends on the rows.
        """
        ranks = tuple(loss.ndim or 0 for loss in losses)
        if not any(ranks):
            return [False] * len(ranks)
        if ranks not in self._found:
            few, more = shapes(_FEW), shapes(_MORE)
            if not len(few) == len(more) == len(losses):
                raise ValueError(
                    "Layers must add the same number of losses for any number of rows. Got "
                    f"{len(losses)} for a micro-batch, {len(few)} for {_FEW} rows and {len(more)} "
                    f"for {_MORE}. Add a loss of zeros where there is none."
                )
            self._found[ranks] = [a != b or None in a for a, b in zip(few, more, strict=True)]
        return self._found[ranks]


def shapes_of_added(model: keras.Model, forward: Callable[[], list[Any]]) -> list[Shape]:
    """Shapes of what layers add in a forward pass.

    Keras divides an activity regulariser by the rows, so what it returns, of whatever shape, is a
    mean over rows: here a number.

    Args:
        model: the model.
        forward: runs the model and returns its losses.
    """
    with _numbers_for_activities(model):
        return [tuple(loss.shape) for loss in forward()]


@contextmanager
def _numbers_for_activities(model: keras.Model) -> Iterator[None]:
    regularised = {
        id(layer): (layer, layer.activity_regularizer)
        for layer in model._flatten_layers()
        if layer.activity_regularizer is not None
    }
    try:
        for layer, _ in regularised.values():
            vars(layer)["activity_regularizer"] = keras.ops.mean
        yield
    finally:
        for layer, regulariser in regularised.values():
            vars(layer)["activity_regularizer"] = regulariser
