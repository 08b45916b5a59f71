"""The part of a window that is the same on every backend.

A backend loops over the micro-batches. It runs `forward`, `loss` and `update_metrics` once per
micro-batch, adds up what they return, and passes the sums to `track` and `results`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from virtualbatch.keras._added_losses import AddedLosses, Shape, shapes_of_added
from virtualbatch.keras._batchnorm import batchnorm_layers
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._gather.loss import (
    GatheredPredictions,
    added_to,
    loss_of_all_rows,
)
from virtualbatch.keras._overwritten import are_overwritten
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._terms import Contribution, contribution
from virtualbatch.keras._window_metrics import WindowMetrics


class WindowModel(WindowMetrics):
    """One batch of `fit` as micro-batches: the computations of the model, without the loop.

    Args:
        model: a compiled model.
        rows: rows of the whole batch; int or integer scalar.
        added: what is known of the losses that its layers add.
        gathering: whose predictions are gathered, if any; see `virtualbatch.keras._gather`.
    """

    def __init__(
        self,
        model: keras.Model,
        rows: Any,
        added: AddedLosses,
        gathering: Gathering | None = None,
    ):
        super().__init__(model, rows, gathering)
        self._added = added
        self._predictions = GatheredPredictions(gathering) if gathering else None
        self.batchnorm = batchnorm_layers(model)
        self.overwritten = are_overwritten(model.trainable_variables)
        self._own_loss = type(model).compute_loss is not keras.Model.compute_loss
        # Known once the loss is traced or has run eagerly. No tensor is kept.
        self.needs_count = False
        self.losses_of_one_number: list[str] = []
        self.unreduced = False

    def forward(self, x: Any) -> Any:
        """Predictions of a micro-batch, in training mode."""
        model = self.model
        return model(x, training=True) if model._call_has_training_arg else model(x)

    def loss(
        self,
        batch: Any,
        y_pred: Any,
        rows: Rows,
        totals: Callable[[], Any],
        added_shapes: Callable[[int], Sequence[Shape]],
    ) -> tuple[Any, list[Any]]:
        """A micro-batch's part of the window's loss and of its per-output losses.

        Args:
            batch: (x, y, sample_weight) of the micro-batch.
            y_pred: the result of `forward` for it. No other forward may run in between.
            rows: rows of the micro-batch and the window.
            totals: returns the results of `counted`, summed over all micro-batches. It is called
                only if a weight has to be counted.
            added_shapes: number of rows -> the result of the method `added_shapes` for that many
                rows of the micro-batch.

        Returns:
            (part of the loss, parts of the per-output loss metrics). Summed over micro-batches,
            these scalars give the values of the whole batch.

        Raises:
            ValueError: the model has no loss.
        """
        model = self.model
        if self._own_loss:
            loss = self._own_loss_of(batch, y_pred)
            return loss * rows.share(loss.dtype), []
        # Read this first: the next run of the model clears the losses that layers have added.
        parts = self.added(rows, added_shapes)
        tracked: list[Any] = []
        if model._compile_loss is not None:
            found = self._noted(self._contribution(batch, y_pred, rows, totals))
            tracked = found.tracked
            parts = [part for part in (found.total, *parts) if part is not None]
        if not parts:
            raise ValueError("No loss to compute. Provide a `loss` argument in `compile()`.")
        return parts[0] if len(parts) == 1 else keras.ops.sum(parts), tracked

    def added(self, rows: Rows, added_shapes: Callable[[int], Sequence[Shape]]) -> list[Any]:
        """A micro-batch's part of each loss that layers and regularisers have added.

        Args:
            rows: rows of the micro-batch and the window.
            added_shapes: see `loss`.

        Returns:
            Scalars in the order of `model.losses`. Summed over micro-batches, they give the values
            of the whole batch.
        """
        losses = list(self.model.losses)
        parts = [self.model._aggregate_additional_loss(loss) for loss in losses]
        # The shares sum to 1. So terms of weights alone are multiplied by them too, like means
        # over rows.
        return [
            part if is_sum else part * rows.share(part.dtype)
            for part, is_sum in zip(parts, self._added.are_sums(losses, added_shapes), strict=True)
        ]

    def arrays(self, batch: Any, y_pred: Any, rows: Rows) -> list[Any]:
        """The gathered predictions of a micro-batch: leaves, then for each its mask or None.

        Args:
            batch: (x, y, sample_weight) of the micro-batch.
            y_pred: the result of `forward` for it.
            rows: rows of the micro-batch and the window.

        Raises:
            ValueError: a prediction does not have one entry per row.
        """
        metrics = self.model._compile_metrics
        if metrics is not None and not metrics.built:
            # Building metrics needs all predictions, and the gathered ones may be only a part.
            metrics.build(batch[1], y_pred)
        return self._gathered.arrays(y_pred, rows.here if rows.on_host else None)

    def joined(self, arrays: Sequence[Any]) -> Any:
        """Predictions of all rows from `arrays`, concatenated, with their masks."""
        return self._gathered.joined(arrays)

    def predictions(self, y_pred: Any) -> list[Any]:
        """The gathered leaves of a micro-batch's predictions, in the order of `arrays`."""
        return self._gathered.of(y_pred)

    def loss_of_all_rows(
        self, batch: Any, y_pred: Any, added: Sequence[Any]
    ) -> tuple[Any, list[Any]]:
        """The losses that see all rows, summed, and the values that Keras logs for each output.

        Args:
            batch: (x, y, sample_weight) of the whole batch.
            y_pred: the result of `joined`.
            added: the results of `added`, summed over micro-batches.

        Returns:
            (the loss, including the losses that layers added; values of per-output losses). All
            are scalars.

        Raises:
            ValueError: the model has no loss.
        """
        model = self.model
        _, y, sample_weight = batch
        if self._own_loss:
            with added_to(model, added):
                return self._own_loss_of(batch, y_pred), []
        parts, tracked = list(added), []
        if model._compile_loss is not None:
            found = self._noted(
                loss_of_all_rows(model._compile_loss, y, y_pred, sample_weight, self._gathers)
            )
            parts, tracked = [found.total, *parts], found.tracked
        if not parts:
            raise ValueError("No loss to compute. Provide a `loss` argument in `compile()`.")
        return parts[0] if len(parts) == 1 else keras.ops.sum(parts), tracked

    def cut_loss(
        self, batch: Any, y_pred: Any, rows: Rows, totals: Callable[[], Any]
    ) -> tuple[Any, list[Any]]:
        """A micro-batch's part of the losses that do not see all rows; see `loss`.

        Returns:
            (part of the loss, parts of the per-output losses). (None, []) if every loss sees all
            rows.
        """
        losses = self._gathers.losses
        if losses is None or all(losses):
            return None, []
        found = self._noted(self._contribution(batch, y_pred, rows, totals))
        return found.total, found.tracked

    def tracked(self, of_all_rows: Sequence[Any], cut: Sequence[Any]) -> list[Any]:
        """Merges the values of per-output losses into the order of Keras' metrics.

        Args:
            of_all_rows: values of the losses that see all rows.
            cut: values of the other losses.
        """
        if not of_all_rows or not cut:
            return [*of_all_rows, *cut]
        whole, parts = iter(of_all_rows), iter(cut)
        return [next(whole) if there else next(parts) for there in self._gathers.losses or ()]

    def counted(self, batch: Any, rows: Rows) -> Any:
        """The weights vector of a micro-batch, computed with a forward of its own.

        It holds the weights that depend on the data or on a forward, such as sums of masks. The
        forward runs in a scope, so seeds, statistics and added losses of the model do not change.
        Only its masks are needed, so a graph prunes the rest.
        """
        with keras.StatelessScope():
            return self.weights(batch, self.forward(batch[0]), rows)

    def added_shapes(self, x: Any) -> list[Shape]:
        """Shapes of the losses that layers add for a batch. The forward leaves no other effect."""

        def forward() -> list[Any]:
            # In a scope, Keras gives regularisers only the values that the scope maps.
            values = [(variable, variable.value) for variable in self.model.trainable_variables]
            with keras.StatelessScope(values, collect_losses=True):
                self.forward(x)
                return list(self.model.losses)

        return shapes_of_added(self.model, forward)

    def counted_of(self, batch: Any, y_pred: Any, rows: Rows) -> Any:
        """The weights vector for the losses that do not see all rows, from existing predictions.

        Returns:
            A vector. None if nothing has to be counted, or if every loss sees all rows.
        """
        losses = self._gathers.losses
        return None if losses is None or all(losses) else self.weights(batch, y_pred, rows)

    def weights(self, batch: Any, y_pred: Any, rows: Rows) -> Any:
        """The weights vector, computed from predictions that already exist; see `counted`."""
        return self._contribution(batch, y_pred, rows, _Ones).counted

    @property
    def reads_inputs(self) -> bool:
        """Whether the loss or the metrics of all rows get the inputs too."""
        return self._own_loss or self.own_metrics

    @property
    def _gathered(self) -> GatheredPredictions:
        if self._predictions is None:
            raise RuntimeError("internal: a window that gathers nothing has no predictions.")
        return self._predictions

    def _own_loss_of(self, batch: Any, y_pred: Any) -> Any:
        """The result of an overridden `compute_loss`."""
        x, y, sample_weight = batch
        return self.model._compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
        )

    def _contribution(
        self, batch: Any, y_pred: Any, rows: Rows, totals: Callable[[], Any]
    ) -> Contribution:
        _, y, sample_weight = batch
        skipped = () if self.gathering is None else self.gathering.losses or ()
        return contribution(
            self.model._compile_loss, y, y_pred, sample_weight, rows, totals, skipped
        )

    def _noted(self, found: Contribution) -> Contribution:
        """Keeps what a contribution shows about the loss, and returns the contribution."""
        self.needs_count = self.needs_count or found.needs_count
        self.losses_of_one_number = found.numbers
        self.unreduced = self.unreduced or found.unreduced
        self._tracked_by_rows = self._tracked_by_rows or found.tracked_by_rows
        return found


class _Ones:
    """Stands for the weights while they are still being counted: every weight is 1."""

    def __getitem__(self, k: int) -> float:
        return 1.0
