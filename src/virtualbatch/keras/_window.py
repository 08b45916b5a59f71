"""What every backend does with the micro-batches of one window, whatever loops over them.

A backend runs `forward`, `loss` and `update_metrics` once per micro-batch, adds up what they give,
and hands the sums to `track` and `results`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras.src import backend

from virtualbatch.keras._added_losses import AddedLosses, Shape, shapes_of_added
from virtualbatch.keras._batchnorm import batchnorm_layers
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._gather.loss import (
    GatheredPredictions,
    added_to,
    loss_of_all_rows,
    update_metrics,
)
from virtualbatch.keras._overwritten import are_overwritten
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._terms import Contribution, contribution


class WindowModel:
    """One batch of `fit` as micro-batches: what depends on the model, without control flow.

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
        self.model = model
        self.rows = rows
        self.gathering = gathering
        self._added = added
        self._predictions = GatheredPredictions(gathering) if gathering else None
        self.batchnorm = batchnorm_layers(model)
        self.overwritten = are_overwritten(model.trainable_variables)
        self.own_metrics = type(model).compute_metrics is not keras.Model.compute_metrics
        self._own_loss = type(model).compute_loss is not keras.Model.compute_loss
        # What is known of the loss once it is traced, or eagerly run; its tensors are not kept.
        self.needs_count = False
        self.losses_of_one_number: list[str] = []
        self.unreduced = False
        self._tracked_by_rows = False

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
            y_pred: what `forward` gave for it, just before.
            rows: rows of the micro-batch and the window.
            totals: returns the sum of what `counted` gives for each micro-batch; called only
                where a weight has to be counted.
            added_shapes: rows -> what `added_shapes` gives for so many rows of the micro-batch.

        Returns:
            (part of the loss, parts of the per-output loss metrics): scalars that add up to those
            of the whole batch.

        Raises:
            ValueError: the model has no loss.
        """
        model = self.model
        if self._own_loss:
            loss = self._own_loss_of(batch, y_pred)
            return loss * rows.share(loss.dtype), []
        # Read first: another run of the model forgets what layers have added.
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
            Scalars that add up to those of the whole batch, in the order of `model.losses`.
        """
        losses = list(self.model.losses)
        parts = [self.model._aggregate_additional_loss(loss) for loss in losses]
        # Terms of weights alone are shared as means over rows are, because the shares sum to 1.
        return [
            part if is_sum else part * rows.share(part.dtype)
            for part, is_sum in zip(parts, self._added.are_sums(losses, added_shapes), strict=True)
        ]

    def arrays(self, batch: Any, y_pred: Any, rows: Rows) -> list[Any]:
        """What of a micro-batch's predictions is gathered: leaves, then their masks or Nones.

        Args:
            batch: (x, y, sample_weight) of the micro-batch.
            y_pred: what `forward` gave for it.
            rows: rows of the micro-batch and the window.

        Raises:
            ValueError: a prediction has not one entry per row.
        """
        metrics = self.model._compile_metrics
        if metrics is not None and not metrics.built:
            # Later some predictions are missing.
            metrics.build(batch[1], y_pred)
        return self._gathered.arrays(y_pred, rows.here if rows.on_host else None)

    def joined(self, arrays: Sequence[Any]) -> Any:
        """Predictions of all rows from `arrays`, concatenated, with their masks."""
        return self._gathered.joined(arrays)

    def predictions(self, y_pred: Any) -> list[Any]:
        """The leaves of a micro-batch's predictions that are gathered, as `arrays` has them."""
        return self._gathered.of(y_pred)

    def loss_of_all_rows(
        self, batch: Any, y_pred: Any, added: Sequence[Any]
    ) -> tuple[Any, list[Any]]:
        """The loss of what sees all rows, and the parts of it that Keras logs for each output.

        Args:
            batch: (x, y, sample_weight) of the whole batch.
            y_pred: what `joined` gave.
            added: what `added` gave for the micro-batches, added up.

        Returns:
            (the loss, with all that layers added; values of per-output losses): scalars.

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
            (part of the loss, parts of the per-output losses); (None, []) where all see all rows.
        """
        losses = self._gathers.losses
        if losses is None or all(losses):
            return None, []
        found = self._noted(self._contribution(batch, y_pred, rows, totals))
        return found.total, found.tracked

    def tracked(self, of_all_rows: Sequence[Any], cut: Sequence[Any]) -> list[Any]:
        """Values of per-output losses in the order in which Keras keeps their metrics."""
        if not of_all_rows or not cut:
            return [*of_all_rows, *cut]
        whole, parts = iter(of_all_rows), iter(cut)
        return [next(whole) if there else next(parts) for there in self._gathers.losses or ()]

    def counted(self, batch: Any, rows: Rows) -> Any:
        """Weights of a micro-batch that only a forward reveals, as a vector.

        The forward changes nothing: random seeds, statistics and added losses do so in a scope
        only. Nothing but the masks is needed of it, so a graph prunes the rest.
        """
        with keras.StatelessScope():
            return self.weights(batch, self.forward(batch[0]), rows)

    def added_shapes(self, x: Any) -> list[Shape]:
        """Shapes of the losses that layers add for a batch; nothing else comes of the forward."""

        def forward() -> list[Any]:
            # Regularisers are given the values of a scope, or nothing.
            values = [(variable, variable.value) for variable in self.model.trainable_variables]
            with keras.StatelessScope(values, collect_losses=True):
                self.forward(x)
                return list(self.model.losses)

        return shapes_of_added(self.model, forward)

    def counted_of(self, batch: Any, y_pred: Any, rows: Rows) -> Any:
        """The same of predictions that are there already, for losses that do not see all rows.

        Returns:
            A vector; None where nothing has to be counted, or every loss sees all rows.
        """
        losses = self._gathers.losses
        return None if losses is None or all(losses) else self.weights(batch, y_pred, rows)

    def weights(self, batch: Any, y_pred: Any, rows: Rows) -> Any:
        """The same vector from predictions of the micro-batch that are there already."""
        return self._contribution(batch, y_pred, rows, _Ones).counted

    def update_metrics(self, batch: Any, y_pred: Any, rows: Rows) -> dict[str, Any]:
        """Shows a micro-batch to the compiled metrics.

        Args:
            batch: (x, y, sample_weight) of the micro-batch.
            y_pred: what `forward` gave for it.
            rows: rows of the micro-batch and the window.

        Returns:
            What an overridden `compute_metrics` gives; else nothing. Outputs that are gathered are
            left to `update_metrics_of_all_rows`.
        """
        model = self.model
        x, y, sample_weight = batch
        if rows.is_stretched:
            _weigh_trimmed(y_pred, rows.stretch)
        gathering = self.gathering
        if gathering is not None and gathering.takes_all:
            return {}
        if self.own_metrics:
            return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        # Keras' own also computes every result, which is of no use before the window ends.
        if model._compile_metrics is None:
            return {}
        if gathering is None:
            model._compile_metrics.update_state(y, y_pred, sample_weight)
        else:
            update_metrics(
                model._compile_metrics,
                lambda k: not gathering.takes(k),
                *(y, y_pred, sample_weight),
            )
        return {}

    def update_metrics_of_all_rows(self, batch: Any, y_pred: Any) -> dict[str, Any]:
        """Shows the outputs that are gathered to their metrics, once.

        Args:
            batch: (x, y, sample_weight) of the whole batch.
            y_pred: what `joined` gave, as metrics see it.

        Returns:
            What an overridden `compute_metrics` gives, where every output is gathered; else
            nothing.
        """
        model, gathering = self.model, self._gathers
        x, y, sample_weight = batch
        if self.own_metrics:
            if not gathering.takes_all:
                return {}
            found: dict[str, Any] = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
            return found
        if model._compile_metrics is not None:
            update_metrics(model._compile_metrics, gathering.takes, y, y_pred, sample_weight)
        return {}

    @property
    def reads_inputs(self) -> bool:
        """Whether a loss or metrics of all rows are given the inputs, too."""
        return self._own_loss or self.own_metrics

    @property
    def tracked_rows(self) -> Any:
        """Rows that trackers count for this window."""
        return self.rows

    def track(self, loss: Any, tracked: list[Any]) -> None:
        """Shows the window's loss and per-output losses to their metrics, once."""
        model = self.model
        model._loss_tracker.update_state(loss, sample_weight=self.tracked_rows)
        if tracked:
            weight = self.tracked_rows if self._tracked_by_rows else None
            for metric, value in zip(model._compile_loss.metrics, tracked, strict=True):
                metric.update_state(value, sample_weight=weight)

    def results(self, latest: dict[str, Any]) -> dict[str, Any]:
        """The logs of this batch.

        Args:
            latest: what `update_metrics` gave for the last micro-batch.
        """
        results = self.model.get_metrics_result()
        if not self.own_metrics:
            return results
        return {name: results.get(name, value) for name, value in latest.items()}

    @property
    def _gathers(self) -> Gathering:
        if self.gathering is None:
            raise RuntimeError("internal: a window that gathers nothing has no loss of all rows.")
        return self.gathering

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
        """A contribution, after what it shows of the loss is kept."""
        self.needs_count = self.needs_count or found.needs_count
        self.losses_of_one_number = found.numbers
        self.unreduced = self.unreduced or found.unreduced
        self._tracked_by_rows = self._tracked_by_rows or found.tracked_by_rows
        return found


def _weigh_trimmed(y_pred: Any, stretch: Any) -> None:
    """Makes metrics weigh rows that were trimmed as those that were not.

    Keras averages the tokens of a row before it adds up rows, so each row would weigh by the length
    to which it is padded. Those metrics multiply their weights by the mask of the predictions.
    """
    for found in keras.tree.flatten(y_pred):
        if len(found.shape) > 2:
            mask = backend.get_keras_mask(found)
            weight = keras.ops.ones_like(found[..., 0]) if mask is None else mask
            weight = keras.ops.cast(weight, keras.backend.floatx())
            backend.set_keras_mask(found, weight / keras.ops.cast(stretch, weight.dtype))


class _Ones:
    """Weights that are not used: divides by 1 while the weights are still being counted."""

    def __getitem__(self, k: int) -> float:
        return 1.0
