"""Keras' own loss on the predictions of all rows, and its metrics, split by output."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import tree
from keras.src import backend

from virtualbatch.keras._gather.gathering import Gathering, chosen_of
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._terms import (
    Contribution,
    Recorded,
    logged_as_mean,
    shallow_copy,
    with_other_losses,
)

# Stands for a prediction that no loss reads.
_UNREAD = 0


class GatheredPredictions:
    """Joins the predictions of micro-batches into predictions of all rows.

    Args:
        gathering: which predictions are gathered.
    """

    def __init__(self, gathering: Gathering):
        self._gathering = gathering
        self._structure: Any = None

    def of(self, y_pred: Any) -> list[Any]:
        """The leaves that are gathered."""
        return chosen_of(tree.flatten(y_pred), self._gathering)

    def arrays(self, y_pred: Any, rows: int | None) -> list[Any]:
        """The leaves that are gathered, and then for each its mask, or None.

        Args:
            y_pred: predictions of a micro-batch.
            rows: its rows; None if they are known only at run time.

        Raises:
            ValueError: a gathered leaf does not have one entry per row.
        """
        self._structure = tree.map_structure(lambda _: _UNREAD, y_pred)
        found = self.of(y_pred)
        for leaf in found:
            shape = tuple(leaf.shape)
            if not shape or (None not in (shape[0], rows) and shape[0] != rows):
                raise ValueError(not_of_rows(f"the shape {shape}", rows or "some"))
        return [*found, *map(backend.get_keras_mask, found)]

    def joined(self, arrays: Sequence[Any]) -> Any:
        """Predictions of all rows, with their masks. Leaves that are not gathered are a number.

        Args:
            arrays: the results of `arrays` for all micro-batches, concatenated.
        """
        count = len(arrays) // 2
        for leaf, mask in zip(arrays[:count], arrays[count:], strict=True):
            if mask is not None:
                backend.set_keras_mask(leaf, mask)
        leaves = iter(arrays[:count])
        flat = [
            next(leaves) if self._gathering.takes(k) else leaf
            for k, leaf in enumerate(tree.flatten(self._structure))
        ]
        return tree.pack_sequence_as(self._structure, flat)


def not_of_rows(got: Any, rows: Any) -> str:
    """The error text for predictions that do not have one entry per row."""
    return (
        "Predictions that a loss sees for all rows must have one entry per row. "
        f"Got {got} for {rows} rows. Return one entry per row, and reduce over rows in the loss."
    )


def loss_of_all_rows(
    compile_loss: Any, y: Any, y_pred: Any, sample_weight: Any, gathering: Gathering
) -> Contribution:
    """Runs Keras' own loss on all rows, with only those entries that see all rows.

    Args:
        compile_loss: the model's `CompileLoss`. It must be built if only some entries see all rows.
        y: targets of all rows.
        y_pred: predictions of all rows. Leaves that no such entry reads may be anything.
        sample_weight: sample weights of all rows, or None.
        gathering: which entries see all rows.
    """
    metrics: list[Recorded] = []

    def choose(entries: Sequence[Any]) -> Sequence[Any]:
        flags = gathering.losses or [True] * len(entries)
        return [entry for entry, there in zip(entries, flags, strict=True) if there]

    total = with_other_losses(compile_loss, choose, metrics)(y, y_pred, sample_weight)
    unreduced = len(total.shape) > 0
    if unreduced:
        rows = keras.ops.shape(total)[0]
        total = logged_as_mean(keras.ops.sum(total), total, Rows(rows, rows))
    seen = [metric for metric in metrics if metric.value is not None]
    return Contribution(
        total=total,
        tracked=[metric.value for metric in seen],
        tracked_by_rows=any(metric.sample_weight is not None for metric in seen),
        counted=None,
        numbers=[],
        unreduced=unreduced,
    )


def update_metrics(
    compile_metrics: Any, is_shown: Callable[[int], bool], y: Any, y_pred: Any, sample_weight: Any
) -> None:
    """Shows some outputs to their compiled metrics.

    Args:
        compile_metrics: the model's `CompileMetrics`, built.
        is_shown: index of a leaf of the predictions -> whether it is shown.
        y: targets.
        y_pred: predictions. Outputs that are not shown may be anything.
        sample_weight: sample weights of the rows, or None.
    """
    numbers = tree.pack_sequence_as(y_pred, list(range(len(tree.flatten(y_pred)))))
    run = shallow_copy(compile_metrics)
    shown = [is_shown(k) for k in run._flatten_y(numbers)]
    for name in ("_flat_metrics", "_flat_weighted_metrics"):
        found = zip(getattr(run, name), shown, strict=True)
        setattr(run, name, [metrics if there else None for metrics, there in found])
    run.update_state(y, y_pred, sample_weight)


@contextmanager
def added_to(model: keras.Model, losses: Sequence[Any]) -> Iterator[None]:
    """Makes `model.losses` return the given losses inside the context.

    An empty list leaves the losses that the layers add themselves.
    """
    before, model._losses_override = model._losses_override, list(losses)
    try:
        yield
    finally:
        model._losses_override = before
