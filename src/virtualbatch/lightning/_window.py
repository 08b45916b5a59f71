"""Runs one update of a trainer as one window, and collects what the training step returns."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from virtualbatch.lightning._kept import Kept
from virtualbatch.lightning._logs import Logs
from virtualbatch.lightning._outputs import Outputs
from virtualbatch.lightning._pieces import Piece
from virtualbatch.plan.auto import is_automatic
from virtualbatch.torch._batch import read
from virtualbatch.torch._call import Call
from virtualbatch.torch._deferred import window_loss
from virtualbatch.torch._fit import Fit
from virtualbatch.torch._handover import hooks_set_aside
from virtualbatch.torch._microbatch import most_rows
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._replicas.found import quiet
from virtualbatch.torch._window import Program
from virtualbatch.window.window import Window


class Given(NamedTuple):
    """The arguments that Lightning passes to a training step.

    Fields:
        batch: the batch, on the device of the module.
        args: further positional arguments, such as the number of the batch.
        kwargs: keyword arguments.
    """

    batch: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class MicrobatchLoss:
    """The loss function for the engine. A module has one, so that the engine checks it only once.

    Args:
        step: an object with the module's own training step as `__wrapped__`.
        microbatch_size: see `accumulate`.
        weight: see `accumulate`.

    Attributes:
        microbatch_size: as given.
        weight: as given.
    """

    def __init__(self, step: Any, microbatch_size: Any, weight: Any):
        self._step = step
        self.microbatch_size = microbatch_size
        self.weight = weight
        self._heard: _Heard | None = None

    # The engine identifies a loss by the code under this name.
    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own training step."""
        found: Callable[..., Any] = self._step.__wrapped__
        return found

    def __call__(self, microbatch: Any) -> tuple[torch.Tensor, None]:
        """The loss of a micro-batch and empty aux. With aux, rows without weight run too."""
        if self._heard is None:
            raise ValueError("internal: a training step runs outside a window.")
        return self._heard.loss(self.__wrapped__, microbatch), None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the window that runs now, because a copy of the module has no part in it."""
        return vars(self) | {"_heard": None}

    @contextmanager
    def heard(self, found: "_Heard") -> Iterator[None]:
        """Collects what the training step returns and logs inside the context."""
        self._heard = found
        try:
            yield
        finally:
            self._heard = None


def run_window(
    loss_fn: MicrobatchLoss, module: Any, batches: Sequence[Given]
) -> tuple[torch.Tensor, dict[str, Any] | None]:
    """Runs the batches of an update.

    Args:
        loss_fn: the loss function of the module.
        module: the LightningModule, in a trainer that trains it.
        batches: the batches, in order.

    Returns:
        The loss, whose backward pass hands the gradients over; and what else the training step
        returns, or None if it returns the loss alone.
    """
    trainer = module.trainer
    logs = Logs(module)
    with logs.instead_of_log():
        heard = _Heard(module, batches, loss_fn.weight, logs)
        with loss_fn.heard(heard):
            loss = _run(loss_fn, trainer, [given.batch for given in batches], heard)
    logs.tell(heard.rows if len(batches) > 1 else None)
    return loss, heard.outputs.together()


def _run(
    loss_fn: MicrobatchLoss, trainer: Any, batches: Sequence[Any], heard: "_Heard"
) -> torch.Tensor:
    # With DDP this is the wrapper module. Lightning calls the step in the wrapper's forward pass.
    found = inventory(trainer.strategy.model, hands_over=True)
    program = Program(loss_fn, loss_fn.weight, True, None, found, begin=heard.begin)
    try:
        call = _call(program, batches, loss_fn.microbatch_size)
        loss: torch.Tensor
        loss, _ = window_loss(call, getattr(trainer.precision_plugin, "scaler", None))
    except BaseException:
        heard.begin()
        raise
    return loss


def _call(program: Program, batches: Sequence[Any], size: Any) -> Call:
    """The window in the engine's form: one batch to cut, or batches that are cut already."""
    if size is not None and len(batches) == 1:
        return Call(program, batches[0], size, None, True)
    if is_automatic(size):
        found = program.found
        with quiet(found), hooks_set_aside(found.owner, found.parameters):
            size = most_rows(Fit(program, read(batches[0]), size, None).cut)
    if size is not None:
        batches = [piece.get() for batch in batches for piece in read(batch).cut(size, None)]
    return Call(program, Window(batches), None, None, True)


class _Heard:
    """Collects what a training step returns and logs for the micro-batches of one window.

    Args:
        module: the LightningModule.
        batches: the batches of the window.
        weight: see `accumulate`.
        logs: records the calls of `self.log`.

    Attributes:
        outputs: what the training step returns beside the loss.
        rows: rows of the window so far; None if they are not known.
    """

    def __init__(self, module: Any, batches: Sequence[Given], weight: Any, logs: Logs):
        self._batches = batches
        self._weight = weight
        self._logs = logs
        self._kept = Kept(module)
        self._module = type(module).__name__
        self._ends: list[int] | None = None
        self.outputs = Outputs()
        self.begin()

    def begin(self) -> None:
        """Forgets an earlier attempt, a trial or a run for planning, and undoes its changes."""
        self._kept.put_back()
        self._logs.clear()
        self.outputs.clear()
        self.rows: int | None = 0
        self._calls = 0

    def loss(self, training_step: Callable[..., Any], microbatch: Any) -> torch.Tensor:
        """Calls the training step with the arguments of the batch that these rows come from."""
        rows = _rows(microbatch)
        given = self._batches[self._number()]
        self._calls += 1
        self.rows = None if rows is None or self.rows is None else self.rows + rows
        output = training_step(microbatch, *given.args, **given.kwargs)
        loss, extra = self._parts(output)
        piece = Piece(rows, self._weight, microbatch, loss.detach())
        self._logs.close(piece)
        self.outputs.add(piece, extra)
        return loss

    def _number(self) -> int:
        """The number of the batch that holds the next micro-batch. Micro-batches come in order."""
        if len(self._batches) == 1:
            return 0
        last = len(self._batches) - 1
        if self.rows is None:
            return min(self._calls, last)
        if self._ends is None:
            rows = [_rows(given.batch) for given in self._batches]
            self._ends = [] if None in rows else list(accumulate(x for x in rows if x is not None))
        if not self._ends:
            return min(self._calls, last)
        return min(bisect_right(self._ends, self.rows), last)

    def _parts(self, output: Any) -> tuple[Any, dict[str, Any] | None]:
        loss, extra = output, None
        if isinstance(output, Mapping):
            loss = output.get("loss")
            extra = {key: value for key, value in output.items() if key != "loss"}
        if not isinstance(loss, torch.Tensor):
            raise ValueError(
                'training_step must return the loss of every micro-batch, or a dict with "loss". '
                f"Got {type(output).__name__} from {self._module}. Return a loss even where no "
                "row counts, or filter such rows in the loader."
            )
        return loss, extra


def _rows(batch: Any) -> int | None:
    """The rows that all tensors of a batch share; None if they do not."""
    return read(Window([batch]), weighted=True).given[0].rows
