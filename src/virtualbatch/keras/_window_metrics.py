"""What a window shows to Keras' metrics, the same on every backend.

Compiled metrics see each micro-batch, or gathered outputs once. The loss trackers see the sums of
the window, once.
"""

from typing import Any

import keras
from keras.src import backend

from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._gather.loss import update_metrics
from virtualbatch.keras._rows import Rows


class WindowMetrics:
    """The metrics of a model during one batch of `fit`.

    Args:
        model: a compiled model.
        rows: rows of the whole batch; int or integer scalar.
        gathering: whose predictions are gathered, if any; see `virtualbatch.keras._gather`.
    """

    def __init__(self, model: keras.Model, rows: Any, gathering: Gathering | None = None):
        self.model = model
        self.rows = rows
        self.gathering = gathering
        self.own_metrics = type(model).compute_metrics is not keras.Model.compute_metrics
        # Known once the loss is traced or has run eagerly.
        self._tracked_by_rows = False

    def update_metrics(self, batch: Any, y_pred: Any, rows: Rows) -> dict[str, Any]:
        """Shows a micro-batch to the compiled metrics.

        Args:
            batch: (x, y, sample_weight) of the micro-batch.
            y_pred: the result of `forward` for it.
            rows: rows of the micro-batch and the window.

        Returns:
            The result of an overridden `compute_metrics`; else an empty dict. Gathered outputs are
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
        # Keras' own compute_metrics also computes every result, but results are read only at the
        # end of the window.
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
        """Shows the gathered outputs to their metrics, once per window.

        Args:
            batch: (x, y, sample_weight) of the whole batch.
            y_pred: the result of `joined`, in the form that metrics see.

        Returns:
            The result of an overridden `compute_metrics`, if every output is gathered; else an
            empty dict.
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
    def tracked_rows(self) -> Any:
        """The number of rows that the loss trackers count for this window."""
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
            latest: the result of `update_metrics` for the last micro-batch.
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


def _weigh_trimmed(y_pred: Any, stretch: Any) -> None:
    """Gives trimmed rows the weight in metrics that they would have without trimming.

    Keras averages the tokens of a row before it adds up rows, so the weight of a row would depend
    on its padded length. Metrics multiply their weights by the mask of the predictions, so the
    mask is divided by the stretch.
    """
    for found in keras.tree.flatten(y_pred):
        if len(found.shape) > 2:
            mask = backend.get_keras_mask(found)
            weight = keras.ops.ones_like(found[..., 0]) if mask is None else mask
            weight = keras.ops.cast(weight, keras.backend.floatx())
            backend.set_keras_mask(found, weight / keras.ops.cast(stretch, weight.dtype))
