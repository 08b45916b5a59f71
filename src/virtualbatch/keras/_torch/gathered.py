"""One batch of `fit` whose loss sees all rows, on PyTorch: forward, loss, and forward again.

The first pass keeps the predictions of all rows. The loss is computed once on them. The second pass
goes through the same micro-batches with the gradients of their predictions.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import torch
from keras import tree

from virtualbatch.keras._added_losses import AddedLosses
from virtualbatch.keras._batchnorm import recorded_moments
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._not_finite import PREDICTIONS
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._torch.gathered_rows import GatheredRows
from virtualbatch.keras._torch.gradients import Gradients
from virtualbatch.keras._torch.state import Beginning
from virtualbatch.keras._torch.window import Microbatch, WindowRun, added_up, detached
from virtualbatch.torch._batchnorm import MergedStatistics

# A micro-batch that is the whole batch, so its share is 1.
_WHOLE = Rows(1, 1)


class GatheredRun(WindowRun):
    """One batch of `fit` whose loss sees all rows.

    Args:
        model: see `WindowRun`.
        batch: (x, y, sample_weight) of all rows. The parts that are read are on Keras' device.
        rows: see `WindowRun`.
        cut: see `WindowRun`.
        added: see `WindowRun`.
        gathering: whose predictions are gathered.
    """

    told_of = PREDICTIONS

    def __init__(
        self,
        model: keras.Model,
        batch: Any,
        rows: int,
        cut: Sequence[Microbatch],
        added: AddedLosses,
        gathering: Gathering,
    ):
        super().__init__(model, rows, cut, added, False, gathering)
        self._batch = batch
        self._is_cut = not all(gathering.losses or [])
        self._is_seen_whole = gathering.takes_all and not self._is_cut
        # Sums and rows of the first pass; none holds a graph.
        self._added_by_layers: list[torch.Tensor] = []
        self._rows: GatheredRows | None = None
        self._takes_gradient: list[bool] = []

    def _run(self, gradients: Gradients, statistics: MergedStatistics) -> None:
        beginning = Beginning(self._model)
        for microbatch in self._cut:
            self._gather(microbatch, statistics)
        if self._rows is None:
            raise RuntimeError("internal: a window ran no micro-batch.")
        of_predictions, of_added = self._differentiate_loss(self._rows, gradients)
        if self._is_seen_whole and not gradients.parameters:
            return
        end = Beginning(self._model)
        # The second pass goes in the same order, so it draws the same random numbers.
        beginning.restore()
        of_all_rows, self._losses = self._losses, []
        for microbatch in self._cut:
            theirs = self._rows.of(microbatch.place, of_predictions)
            self._add_again(microbatch, gradients, theirs, of_added)
        # This keeps also what the loss itself drew and wrote.
        end.restore()
        (loss, *tracked), (cut_loss, *cut) = of_all_rows, self._losses or [0.0]
        self._losses = [loss + cut_loss, *self._window.tracked(tracked, cut)]

    def _gather(self, microbatch: Microbatch, statistics: MergedStatistics) -> None:
        """The first forward pass of one micro-batch. Its graph is not kept.

        The forward builds a graph all the same, because some layers compute other values without
        one.
        """
        window, batch = self._window, microbatch.get()
        rows = Rows(microbatch.rows, window.rows, microbatch.stretch)
        with statistics.forward(), recorded_moments(window.batchnorm) as seen:
            y_pred = window.forward(batch[0])
        added = window.added(rows, partial(self._added_shapes, batch[0]))
        arrays = window.arrays(batch, y_pred, rows)
        if self._rows is None:
            self._takes_gradient = [
                leaf is not None and leaf.requires_grad for leaf in window.predictions(y_pred)
            ]
            self._rows = GatheredRows(window.rows, self._trimmed_axes(len(arrays)))
        self._parts.append(_nan_or_0(window.predictions(y_pred)))
        self._rows.write(microbatch.place, [detached(found) for found in arrays])
        self._added_by_layers = added_up(self._added_by_layers, added)
        self._merge(seen)
        counted = window.weights(batch, y_pred, rows) if self._is_cut else None
        if counted is not None:
            self._counted = counted if self._counted is None else self._counted + counted

    def _differentiate_loss(
        self, rows: GatheredRows, gradients: Gradients
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Computes the loss and the metrics of all rows.

        Returns:
            The gradients of the gathered predictions, and of the losses that layers have added.
        """
        window, model = self._window, self._model
        # The losses of the last micro-batch are already in the sums over all rows.
        model._clear_losses()
        for leaf, takes in zip(rows.tensors, self._takes_gradient, strict=False):
            if leaf is not None:
                leaf.requires_grad_(takes)
        added = [value.requires_grad_() for value in self._added_by_layers]
        y_pred = window.joined(rows.tensors)
        loss, tracked = window.loss_of_all_rows(self._batch, y_pred, added)
        if window.unreduced:
            # Raises PyTorch's own error, as for the whole batch.
            loss.expand(window.rows).backward()
        if gradients.parameters:
            optimizer = model.optimizer
            gradients.add(loss if optimizer is None else optimizer.scale_loss(loss), _WHOLE)
        shown = window.joined([detached(found) for found in rows.tensors])
        latest = window.update_metrics_of_all_rows(self._batch, shown)
        self._latest = tree.map_structure(detached, latest)
        self._losses = added_up([], [loss, *tracked])
        return [_gradient(leaf) for leaf in rows.tensors], [_gradient(value) for value in added]

    def _add_again(
        self,
        microbatch: Microbatch,
        gradients: Gradients,
        of_predictions: Sequence[torch.Tensor | None],
        of_added: Sequence[torch.Tensor | None],
    ) -> None:
        """Forward and backward of one micro-batch, as a part of the loss of all rows."""
        window, optimizer = self._window, self._model.optimizer
        batch = microbatch.get()
        rows = Rows(microbatch.rows, window.rows, microbatch.stretch)
        y_pred = window.forward(batch[0])
        added = window.added(rows, partial(self._added_shapes, batch[0]))
        loss, tracked = window.cut_loss(batch, y_pred, rows, self._totals)
        # `of_predictions` also has an entry for each mask, after the predictions. zip drops them.
        products = [*zip(window.predictions(y_pred), of_predictions, strict=False)]
        products += zip(added, of_added, strict=True)
        if loss is not None:
            scaled = loss if optimizer is None else optimizer.scale_loss(loss)
            products.append((scaled, torch.ones_like(scaled)))
            self._losses = added_up(self._losses, [loss, *tracked])
        reached = [pair for pair in products if pair[0].requires_grad and pair[1] is not None]
        if gradients.parameters and reached:
            tensors, cotangents = zip(*reached, strict=True)
            gradients.add_product(tensors, cotangents, rows)
        latest = window.update_metrics(batch, y_pred, rows)
        self._latest |= tree.map_structure(detached, latest)

    def _trimmed_axes(self, count: int) -> list[bool]:
        """For each gathered array, whether its second axis is trimmed with the rows.

        The longest rows come first, so only the last micro-batch is sure to be trimmed if any is. A
        length alone may be a coincidence. So one trimmed row of the last micro-batch is compared
        with one row that is not trimmed.

        Args:
            count: the number of gathered arrays.
        """
        last = self._cut[-1]
        if not last.place.is_trimmed:
            return [False] * count
        trimmed, whole = (self._arrays_of_a_row(x) for x in (last.get()[0], self._batch[0]))
        return [
            found is not None and found.ndim > 1 and found.shape[1] != longer.shape[1]
            for found, longer in zip(trimmed, whole, strict=True)
        ]

    def _arrays_of_a_row(self, x: Any) -> list[Any]:
        """The gathered arrays of the first row of `x`. Its forward leaves no effect."""
        row = tree.map_structure(lambda leaf: leaf[:1] if hasattr(leaf, "shape") else leaf, x)
        with self._without_a_trace(), keras.StatelessScope():
            y_pred = self._window.forward(row)
            return self._window.arrays(self._batch, y_pred, Rows(1, self._window.rows))


def _nan_or_0(predictions: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """NaN where predictions of a micro-batch are not all finite, else 0."""
    found = [x.detach() for x in predictions if x is not None]
    finite = torch.stack([x.isfinite().all() for x in found]).all()
    return torch.where(finite, 0.0, math.nan)


def _gradient(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.grad
