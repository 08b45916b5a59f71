"""One batch of `fit` as micro-batches, on PyTorch: a loop in Python.

Each micro-batch adds its part of the loss, of the gradients and of the BatchNorm moments; then the
optimizer, the trackers and the moving averages move once.
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
from virtualbatch.keras._overwritten import updated
from virtualbatch.keras._rows import Rows
from virtualbatch.keras._torch.state import torch_modules
from virtualbatch.keras._train_step import STATS
from virtualbatch.keras._window import WindowModel
from virtualbatch.noise.estimate import WindowStats
from virtualbatch.torch._batchnorm import MergedStatistics
from virtualbatch.torch._own_memory import OwnMemory
from virtualbatch.torch._state import Buffers
from virtualbatch.torch._stats import GradientNorms
from virtualbatch.window.shares import accumulator_dtype


class Microbatch(NamedTuple):
    """One micro-batch of a window, not yet cut.

    Fields:
        rows: its rows; a Python int.
        get: () -> (x, y, sample_weight) of its rows.
        stretch: padded length over that of its targets, where rows are packed; see `Rows`.
    """

    rows: int
    get: Callable[[], Any]
    stretch: float = 1.0


class WindowRun:
    """One batch of `fit` as micro-batches.

    Args:
        model: a model that is built and compiled.
        rows: rows of the whole batch.
        cut: its micro-batches.
        added: what is known of the losses that layers add.
        stats: whether the logs are to hold statistics of the window.
        gathering: whose predictions are gathered, if any.
    """

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
        # Sums over the micro-batches so far; none holds a graph.
        self._losses: list[torch.Tensor] = []
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
        gradients = _Gradients(parameters, window.overwritten, norms)
        logs: dict[str, Any] = {}
        for module in self._modules:
            # As its wrapper does when it is called: statistics are only read of what trains.
            module.train()
        statistics = MergedStatistics(self._modules, Buffers(self._modules))
        with statistics.attached(), norms.attached() if norms else nullcontext():
            for microbatch in self._cut:
                self._add(microbatch, gradients, statistics)
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
        return window.results(self._latest) | logs

    def _add(
        self, microbatch: Microbatch, gradients: "_Gradients", statistics: MergedStatistics
    ) -> None:
        """Forward and backward of one micro-batch; its activations are free when this returns."""
        window, optimizer = self._window, self._model.optimizer
        batch = microbatch.get()
        rows = Rows(microbatch.rows, window.rows, microbatch.stretch)
        with statistics.forward(), recorded_moments(window.batchnorm) as seen:
            y_pred = window.forward(batch[0])
        added_shapes = partial(self._added_shapes, batch[0])
        loss, tracked = window.loss(batch, y_pred, rows, self._totals, added_shapes)
        if window.unreduced:
            # PyTorch's own error, as for the whole batch.
            loss.expand(window.rows).backward()
        if gradients.parameters:
            gradients.add(loss if optimizer is None else optimizer.scale_loss(loss), rows)
        latest = window.update_metrics(batch, y_pred, rows)

        losses = [value.detach() for value in (loss, *tracked)]
        moments = [found for _, found in seen]
        self._called = [layer for layer, _ in seen]
        self._latest = tree.map_structure(_detached, latest)
        if not self._losses:
            self._losses, self._moments = losses, moments
        else:
            self._losses = [a + b for a, b in zip(self._losses, losses, strict=True)]
            self._moments = merged(self._moments, moments)

    def _stats(self, norms: GradientNorms, gradients: Sequence[torch.Tensor | None]) -> WindowStats:
        """The statistics of a window, without the scale of its loss, which the optimizer moves."""
        found = [g for g in updated(gradients, self._window.overwritten) if g is not None]
        stats = norms.stats(found, self._window.rows, len(self._cut))
        undo = self._model.optimizer.scale_loss(torch.ones_like(stats.square)) ** -2
        return stats._replace(mean_square=stats.mean_square * undo, square=stats.square * undo)

    def _totals(self) -> torch.Tensor:
        """Weights of the window that only a forward reveals, counted without a graph of it."""
        if self._counted is None:
            window = self._window
            with self._without_a_trace():
                for rows, get, stretch in self._cut:
                    counted = window.counted(get(), Rows(rows, window.rows, stretch))
                    self._counted = counted if self._counted is None else self._counted + counted
        return self._counted

    def _added_shapes(self, x: Any, few: int) -> Sequence[Shape]:
        """Shapes of the losses that layers add for so many copies of the first row."""
        rows = tree.map_structure(
            lambda leaf: leaf[[0] * few] if hasattr(leaf, "shape") else leaf, x
        )
        with self._without_a_trace():
            return self._window.added_shapes(rows)

    @contextmanager
    def _without_a_trace(self) -> Iterator[None]:
        """While forwards run of which no graph, random number or buffer of a module stays."""
        buffers = Buffers(self._modules)
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
        buffers.restore()


class _Gradients:
    """Sums the gradients of a window's micro-batches, in `.grad` or in a buffer beside it.

    Where every parameter is float32 or wider, PyTorch itself adds to a fresh `.grad`. Otherwise
    gradients are taken of a micro-batch's own mean, and its share multiplies in the add to a
    float32 buffer, where few bits are lost. What is overwritten is kept beside `.grad` too.

    Args:
        parameters: trainable parameters, each once.
        overwritten: for each, whether its gradient is its new value.
        norms: is told when a micro-batch ends, if statistics are asked for.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        overwritten: Sequence[bool],
        norms: GradientNorms | None,
    ):
        self.parameters = parameters
        self._overwritten = [k for k, found in enumerate(overwritten) if found]
        self._norms = norms
        self._half = any(_wide(parameter) is not parameter.dtype for parameter in parameters)
        self._sums: list[torch.Tensor | None] = [None] * len(parameters)
        self._without_gradient: torch.Tensor | None = None
        self._found_any = False
        for parameter in parameters:
            parameter.grad = None
        self._own_memory = OwnMemory(updated(parameters, overwritten))

    def add(self, loss: torch.Tensor, rows: Rows) -> None:
        """Differentiates one micro-batch's part of the loss."""
        if not loss.requires_grad:
            # A branch may leave a micro-batch without parameters: its gradient is zero.
            self._without_gradient = loss
            return
        self._found_any = True
        share = rows.share("float32")
        # Maxima of the backward pass are of the window's loss, and cannot be scaled later.
        later = share if self._half and not self._overwritten else 1.0
        (loss if later == 1.0 else loss / later).backward()
        self._keep_maxima()
        if self._half:
            self._add_wide(later)
        else:
            self._own_memory.give()
        if self._norms:
            self._norms.close(share, later)

    def _keep_maxima(self) -> None:
        for k in self._overwritten:
            gradient, largest = self.parameters[k].grad, self._sums[k]
            if gradient is not None:
                self.parameters[k].grad = None
                self._sums[k] = gradient if largest is None else torch.maximum(gradient, largest)

    def _add_wide(self, share: float) -> None:
        for k, parameter in enumerate(self.parameters):
            gradient, total = parameter.grad, self._sums[k]
            if gradient is None:
                continue
            parameter.grad = None
            if total is None:
                self._sums[k] = gradient.to(_wide(parameter)) * share
            else:
                total.add_(gradient, alpha=share)

    def finished(self) -> list[torch.Tensor | None]:
        """The window's gradients in the dtypes of the parameters, as `.grad` then holds them."""
        if not self._found_any and self._without_gradient is not None:
            # PyTorch's own error, as for the whole batch.
            self._without_gradient.backward()
        for k in range(len(self.parameters)) if self._half else self._overwritten:
            parameter, total = self.parameters[k], self._sums[k]
            parameter.grad = None if total is None else total.to(parameter.dtype)
        return [parameter.grad for parameter in self.parameters]


def _wide(parameter: torch.Tensor) -> torch.dtype:
    return getattr(torch, accumulator_dtype(str(parameter.dtype).removeprefix("torch.")))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
