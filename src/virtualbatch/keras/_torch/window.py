"""One batch of `fit` as micro-batches, on PyTorch: a loop in Python.

Each micro-batch adds its part of the loss, the gradients and the BatchNorm moments. Then optimizer,
trackers and moving averages are updated once.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import keras
import torch
from keras import tree

from virtualbatch.keras._added_losses import AddedLosses, Shape
from virtualbatch.keras._batchnorm import (
    assign_statistics,
    merged,
    moving_statistics,
    recorded_moments,
)
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._not_finite import LOSSES
from virtualbatch.keras._overwritten import updated
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._torch.gathered_rows import Place
from virtualbatch.keras._torch.gradients import Gradients
from virtualbatch.keras._torch.not_finite import heard
from virtualbatch.keras._torch.state import torch_modules
from virtualbatch.keras._train_step import STATS
from virtualbatch.keras._window import WindowModel
from virtualbatch.noise.estimate import WindowStats
from virtualbatch.torch._batchnorm import MergedStatistics
from virtualbatch.torch._state import Buffers
from virtualbatch.torch._stats import GradientNorms


class Microbatch(NamedTuple):
    """One micro-batch of a window, not yet cut.

    Fields:
        rows: its rows; a Python int.
        place: where its rows stand in the batch.
        get: () -> (x, y, sample_weight) of its rows.
        stretch: padded length over trimmed length, if its targets are trimmed; see `Rows`.
    """

    rows: int
    place: Place
    get: Callable[[], Any]
    stretch: float = 1.0

    @property
    def rows_in_order(self) -> int | None:
        """Its rows, if they are the next ones of the batch; else None."""
        return self.rows if isinstance(self.place.rows, slice) else None


class WindowRun:
    """One batch of `fit` as micro-batches.

    Attributes:
        told_of: what the logs say about each micro-batch, in words; None for its loss.

    Args:
        model: a model that is built and compiled.
        rows: rows of the whole batch.
        cut: its micro-batches.
        added: what is known about the losses that layers add.
        stats: whether the logs get statistics of the window.
        gathering: whose predictions are gathered, if any.
    """

    told_of: str | None = None

    def __init__(
        self,
        model: keras.Model,
        rows: int,
        cut: Sequence[Microbatch],
        added: AddedLosses,
        stats: bool,
        gathering: Gathering | None = None,
    ):
        self._model = model
        self._with_stats = stats
        self._cut = cut
        self._window = WindowModel(model, rows, added, gathering)
        self._modules = torch_modules(model)
        # Sums over the micro-batches so far, without a graph.
        self._losses: list[torch.Tensor] = []
        # One value per micro-batch, for the logs.
        self._parts: list[torch.Tensor] = []
        self._moments: list[Any] = []
        self._called: list[Any] = []
        self._latest: dict[str, Any] = {}
        self._counted: Any = None

    @property
    def losses_of_one_number(self) -> list[str]:
        """Names of losses that gave a number rather than one value per row; known after `train`."""
        return self._window.losses_of_one_number

    def train(self) -> dict[str, Any]:
        """Runs the window and commits it: optimizer, trackers, moving averages."""
        model, window = self._model, self._window
        start = moving_statistics(window.batchnorm)
        variables = model.trainable_variables
        parameters = [variable.value for variable in variables]
        norms = None
        if self._with_stats:
            norms = GradientNorms(updated(parameters, window.overwritten))
        gradients = Gradients(parameters, window.overwritten, norms)
        logs: dict[str, Any] = {}
        for module in self._modules:
            # The wrapper sets this mode too when it is called. But statistics are attached before
            # that, and only to modules in training mode.
            module.train()
        statistics = MergedStatistics(self._modules, Buffers(self._modules))
        with statistics.attached(), norms.attached() if norms else nullcontext():
            self._run(gradients, statistics)
        if variables:
            with torch.no_grad():
                finished = gradients.finished()
                if norms:
                    logs[STATS] = self._stats(norms, finished)
                model.optimizer.apply(finished, variables)
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        statistics.commit()
        assign_statistics(self._called, start, self._moments)
        loss, *tracked = self._losses
        window.track(loss, tracked)
        rows = [found.rows_in_order for found in self._cut]
        logs[LOSSES] = heard(loss, self._parts, rows, self.told_of)
        return window.results(self._latest) | logs

    def _run(self, gradients: Gradients, statistics: MergedStatistics) -> None:
        """Forward and backward of all micro-batches."""
        for microbatch in self._cut:
            self._add(microbatch, gradients, statistics)

    def _add(
        self, microbatch: Microbatch, gradients: Gradients, statistics: MergedStatistics
    ) -> None:
        """Forward and backward of one micro-batch. Its activations are freed when this returns."""
        window, optimizer = self._window, self._model.optimizer
        batch = microbatch.get()
        rows = Rows(microbatch.rows, window.rows, microbatch.stretch)
        with statistics.forward(), recorded_moments(window.batchnorm) as seen:
            y_pred = window.forward(batch[0])
        added_shapes = partial(self._added_shapes, batch[0])
        loss, tracked = window.loss(batch, y_pred, rows, self._totals, added_shapes)
        if window.unreduced:
            # Raises PyTorch's own error, as for the whole batch.
            loss.expand(window.rows).backward()
        if gradients.parameters:
            gradients.add(loss if optimizer is None else optimizer.scale_loss(loss), rows)
        latest = window.update_metrics(batch, y_pred, rows)

        self._latest = tree.map_structure(detached, latest)
        self._losses = added_up(self._losses, [loss, *tracked])
        self._parts.append(loss.detach())
        self._merge(seen)

    def _merge(self, seen: Sequence[tuple[Any, Any]]) -> None:
        """Merges the moments of one micro-batch into the window's moments."""
        self._called = [layer for layer, _ in seen]
        moments = [found for _, found in seen]
        self._moments = merged(self._moments, moments) if self._moments else moments

    def _stats(self, norms: GradientNorms, gradients: Sequence[torch.Tensor | None]) -> WindowStats:
        """The statistics of a window, without the optimizer's loss scale, which changes."""
        found = [g for g in updated(gradients, self._window.overwritten) if g is not None]
        stats = norms.stats(found, self._window.rows, len(self._cut))
        undo = self._model.optimizer.scale_loss(torch.ones_like(stats.square)) ** -2
        return stats._replace(mean_square=stats.mean_square * undo, square=stats.square * undo)

    def _totals(self) -> torch.Tensor:
        """The weights vector of the window, counted with forwards that build no graph."""
        if self._counted is None:
            window = self._window
            with self._without_a_trace():
                for found in self._cut:
                    rows = Rows(found.rows, window.rows, found.stretch)
                    counted = window.counted(found.get(), rows)
                    self._counted = counted if self._counted is None else self._counted + counted
        return self._counted

    def _added_shapes(self, x: Any, few: int) -> Sequence[Shape]:
        """Shapes of the losses that layers add for `few` copies of the first row."""
        rows = tree.map_structure(
            lambda leaf: leaf[[0] * few] if hasattr(leaf, "shape") else leaf, x
        )
        with self._without_a_trace():
            return self._window.added_shapes(rows)

    @contextmanager
    def _without_a_trace(self) -> Iterator[None]:
        """Lets forwards run without a graph, and puts back random numbers and modules' buffers."""
        buffers = Buffers(self._modules)
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
        buffers.restore()


def detached(value: Any) -> Any:
    """A tensor without its graph; anything else as it is."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def added_up(sums: list[torch.Tensor], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Adds the values of one more micro-batch to sums, without a graph.

    `sums` is empty before the first micro-batch.
    """
    found = [value.detach() for value in values]
    return [a + b for a, b in zip(sums, found, strict=True)] if sums else found
