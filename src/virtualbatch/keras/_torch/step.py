"""Keras on PyTorch: a `train_step` that runs one batch as a window, eagerly.

The batch is checked and cut evenly, and the window runs. If a micro-batch raises, all changes are
undone.
"""

from collections.abc import Callable
from typing import Any

import keras

from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.certificate import build_symbolically
from virtualbatch.keras._certify.eager_program import EagerProgram
from virtualbatch.keras._certify.first_window import prove_first_window
from virtualbatch.keras._gather.detection import Evaluate, evaluated_eagerly
from virtualbatch.keras._gather.gathering import Found
from virtualbatch.keras._guard import Guard
from virtualbatch.keras._not_finite import LOSSES
from virtualbatch.keras._packing import Packing
from virtualbatch.keras._torch.batch import packed_window_of, window_of
from virtualbatch.keras._torch.device import place
from virtualbatch.keras._torch.not_finite import LossesOfFit, OfOne
from virtualbatch.keras._torch.plan import MEMORY, planned
from virtualbatch.keras._torch.state import Beginning, State, torch_modules
from virtualbatch.keras._train_step import TrainStep, compiled
from virtualbatch.torch._distributed import distributed_classes, number_of_processes
from virtualbatch.torch._random import RandomState
from virtualbatch.window.cut import even_cut, rows_per_microbatch, sizes_disagree
from virtualbatch.window.tree import array_leaves, common_rows


class TorchStep(TrainStep):
    """The `train_step` of a model that accumulates on PyTorch."""

    def __init__(
        self,
        model: keras.Model,
        microbatch_size: Any,
        accumulation_steps: int | None,
        packing: Packing | None = None,
        check: bool = False,
        gather: bool | Found | None = None,
    ):
        super().__init__(model, microbatch_size, accumulation_steps, packing, check, gather)
        self._guard = Guard(model, self, MEMORY)

    def __call__(self, data: Any) -> dict[str, Any]:
        """Trains on one batch, as Keras' `train_step` does."""
        _refuse_several_processes()
        batch = self._unpacked(data)
        rows = common_rows(array_leaves(batch))
        if rows is None:
            raise ValueError("internal: a batch of PyTorch has no number of rows.")
        random = RandomState(place())
        results: dict[str, Any] = self._guard.run(
            batch,
            rows,
            lambda: self._trained(data, batch, rows),
            random.restore,
            lambda: None,
            lambda limit: planned(self._model, batch, limit, self.found(batch)),
            lambda size: prove_first_window(
                self._model, self, batch, rows, size, BACKEND, MEMORY.errors
            ),
            lambda: self.look_for_coupled(batch, rows, evaluated_eagerly),
        )
        self._guard.succeeded()
        return results

    def look_for_coupled(self, batch: Any, rows: int, evaluate: Evaluate) -> bool:
        """See `TrainStep`. The states of PyTorch's generators and of layers are put back."""
        if self.is_known():
            return False
        beginning = Beginning(self._model)
        try:
            return super().look_for_coupled(batch, rows, evaluate)
        finally:
            beginning.restore()

    def _trained(self, data: Any, batch: Any, rows: int) -> dict[str, Any]:
        model, packing = self._model, self._packing_in_force()
        with State(model).kept_on_failure():
            if packing is not None:
                gathering = self.gathering(batch)
                run = packed_window_of(model, batch, rows, packing, self._added, gathering)
            else:
                cut = even_cut(rows, self._size(rows))
                if len(cut) == 1:
                    loss = OfOne(model)
                    whole: dict[str, Any] = type(model).train_step(model, data)
                    return self.told(whole | {LOSSES: loss.heard(rows)})
                stats, gathering = self.listener is not None, self.gathering(batch)
                run = window_of(model, batch, rows, cut, self._added, stats, gathering)
            results = run.train()
        self._say(run.losses_of_one_number)
        return self.told(results)

    def _losses(self) -> LossesOfFit:
        return LossesOfFit()

    def _size(self, rows: int) -> int:
        """Rows of one micro-batch.

        Args:
            rows: rows of the batch.

        Raises:
            ValueError: two sizes disagree. A short batch may be the last one of its epoch. It
                cannot be if it is the first one: then the loss tracker has counted nothing.
        """
        size, steps = self._asked()
        if size is None and steps is None:
            return self._in_force(rows, None)
        if size is None or steps is None:
            return self._in_force(rows, rows_per_microbatch(rows, size, steps))
        count = -(-rows // size)
        if count > steps or (count < steps and float(self._model._loss_tracker.count) == 0):
            raise ValueError(sizes_disagree(rows, size, steps))
        return self._in_force(rows, size)


def make_train_function(model: keras.Model) -> Callable[..., Any]:
    """A `make_train_function` that runs the window in Python.

    Otherwise PyTorch would compile the whole `train_step`, with the loop over micro-batches
    unrolled.
    """

    def make(force: bool = False) -> None:
        with compiled(model, False):
            type(model).make_train_function(model, force=force)

    return make


def refuse_distributed(model: keras.Model) -> None:
    """Refuses several processes, and layers that wrap a module of DDP or FSDP.

    Raises:
        NotImplementedError: there are several processes, or a layer wraps such a module.
    """
    _refuse_several_processes()
    distributed = distributed_classes()
    for module in torch_modules(model):
        if isinstance(module, distributed):
            raise _trains_one_process(f"a {type(module).__name__} in the model")


def _refuse_several_processes() -> None:
    processes = number_of_processes()
    if processes > 1:
        raise _trains_one_process(f"a process group of {processes} ranks")


def _trains_one_process(got: str) -> NotImplementedError:
    return NotImplementedError(
        f"accumulate trains one process. Got {got}. "
        "Wrap the model in DistributedDataParallel, and call virtualbatch.torch.backward in a loop."
    )


def _sizes(rows: int, size: int) -> list[int]:
    return [stop - start for start, stop in even_cut(rows, size)]


def _kept(model: keras.Model) -> list[Any]:
    return [State(model), RandomState(place())]


BACKEND = Backend(
    refuse=refuse_distributed,
    step=TorchStep,
    make_train_function=make_train_function,
    plan=planned,
    build=build_symbolically,
    program=EagerProgram,
    cut=_sizes,
    is_concrete=lambda value: True,
    kept=_kept,
    evaluate=evaluated_eagerly,
)
