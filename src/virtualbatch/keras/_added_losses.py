"""Losses that layers add: which are sums over rows, and which count once per batch.

Keras sums every array that a layer adds. An array with one value per row becomes a sum over rows,
so each micro-batch adds all of its values. Any other array, or a number, does not depend on the
rows or is a mean over them, so each micro-batch adds its share.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

Shape = tuple[int | None, ...]

# The numbers of rows for which shapes are compared.
_FEW, _MORE = 2, 3


class AddedLosses:
    """What is known about the losses that the layers of one model add."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], list[bool]] = {}

    def are_sums(
        self, losses: Sequence[Any], shapes: Callable[[int], Sequence[Shape]]
    ) -> list[bool]:
        """For each loss, whether it holds one value per row, so that Keras sums over rows.

        A length that equals the number of rows may be a coincidence. So shapes are read for two
        numbers of rows.

        Args:
            losses: the losses of a micro-batch, in the order of `model.losses`.
            shapes: number of rows -> shapes of the losses for that many rows. It is called at most
                twice, and never if every loss is a number.

        Raises:
            ValueError: the number of losses depends on the rows.
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
    """Shapes of the losses that layers add in a forward pass.

    Keras divides the result of an activity regulariser by the rows. So whatever its shape, it is a
    mean over rows, and it counts as a number here.

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
