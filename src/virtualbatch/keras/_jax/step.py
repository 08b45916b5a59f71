"""Keras on JAX: a `train_step` that runs one batch as a window.

Keras compiles the whole step, like its own. The batch is checked and cut while the step is traced,
and the window is a scan in the program.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras

from virtualbatch.jax._batch import cut_batch
from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.certificate import build_symbolically
from virtualbatch.keras._gather.gathering import Found
from virtualbatch.keras._jax.devices import (
    cut_by_device,
    devices_of,
    devices_of_rows,
    rows_of_one_device,
    spread,
)
from virtualbatch.keras._jax.evaluate import evaluated
from virtualbatch.keras._jax.gathered import GatheredRun
from virtualbatch.keras._jax.packing import packed_cut
from virtualbatch.keras._jax.plan import planned
from virtualbatch.keras._jax.program import JaxProgram
from virtualbatch.keras._jax.stateless import State
from virtualbatch.keras._jax.train_function import make_jax_train_function
from virtualbatch.keras._jax.window import WindowRun
from virtualbatch.keras._not_finite import (
    LOSSES,
    NOTHING_KNOWN,
    LossesOfFit,
    without_losses,
)
from virtualbatch.keras._packing import Packing
from virtualbatch.keras._rows import unstretched
from virtualbatch.keras._train_step import TrainStep
from virtualbatch.plan.plan import Plan
from virtualbatch.window.cut import rows_per_microbatch, sizes_disagree
from virtualbatch.window.tree import array_leaves, common_rows


class JaxStep(TrainStep):
    """The `train_step` of a model that accumulates on JAX."""

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
        self._seen_whole = False

    def __call__(self, state: Any, data: Any) -> tuple[dict[str, Any], Any]:
        """Trains on one batch, as Keras' `train_step` does."""
        logs, after = self.with_losses(state, data)
        return without_losses(logs), after

    def with_losses(self, state: Any, data: Any) -> tuple[dict[str, Any], Any]:
        """Trains on one batch. The logs also hold the losses of micro-batches."""
        model = self._model
        batch = self._unpacked(data)
        rows = common_rows(array_leaves(batch))
        if rows is None:
            raise ValueError("internal: a batch of JAX has no number of rows.")
        compiled = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, data)))
        packing, devices = self._packing_in_force(), devices_of(rows)
        if packing is not None:
            cut, stretch, order = packed_cut(model, batch, rows, packing, devices)
        else:
            size = self._size(rows // devices)
            if devices == 1 or size * devices >= rows:
                cut = cut_batch(batch, size * devices, None, compiled=compiled)
            else:
                cut = cut_by_device(batch, rows, size, devices)
            stretch, order = unstretched, None
            if cut.count == 1:
                logs, after = type(model).train_step(model, state, data)
                return logs | {LOSSES: self._told(state, after, rows)}, after
        gathering, before = self.gathering(batch), State(*state)
        if gathering is None or cut.count == 1:
            stats = self.listener is not None
            run = WindowRun(model, cut, before, stretch, self._added, stats)
        else:
            run = GatheredRun(model, batch, cut, order, before, stretch, self._added, gathering)
        logs, after = run.train(compiled)
        self._say(run.losses_of_one_number)
        return logs, tuple(after)

    def _told(self, before: Any, after: Any, rows: int) -> Any:
        """The entry for losses in the logs of Keras' own step, read from its loss tracker."""
        paths = [variable.path for variable in self._model.metrics_variables]
        place = paths.index(self._model._loss_tracker.total.path)
        start, end = State(*before).metrics[place], State(*after).metrics[place]
        known = jnp.where(jnp.isfinite(start), rows, NOTHING_KNOWN).astype(end.dtype)
        return jnp.stack([end - start, known])[None]

    def _losses(self) -> LossesOfFit:
        return LossesOfFit(
            lambda losses, is_latest: all(found.is_ready() for found in jax.tree.leaves(losses))
        )

    def _devices(self) -> int:
        return devices_of_rows()

    def _size(self, rows: int) -> int:
        """Rows of one micro-batch on one device.

        Args:
            rows: rows of the batch on one device.

        Raises:
            ValueError: two sizes disagree. A short batch may be the last one of its epoch. It
                cannot be if no whole batch came before.
        """
        size, steps = self._asked()
        if size is None and steps is None:
            return self._in_force(rows, None)
        if size is None or steps is None:
            return self._in_force(rows, rows_per_microbatch(rows, size, steps))
        count = -(-rows // size)
        if count > steps or (count < steps and not self._seen_whole):
            raise ValueError(sizes_disagree(rows, size, steps))
        self._seen_whole = self._seen_whole or count == steps
        return self._in_force(rows, size)


def _step_of(model: keras.Model, found: Found, size: int) -> Callable[[Any, Any], Any]:
    """The step of a model with micro-batches of `size` rows."""
    return JaxStep(model, size, None, gather=found)


def make_train_function(model: keras.Model) -> Callable[..., Any]:
    """A `make_train_function` that keeps the model's values after errors."""
    return make_jax_train_function(model, BACKEND)


def plan(model: keras.Model, batch: Any, memory_limit: int | str | None, found: Found) -> Plan:
    """The plan for a batch, for a model that need not accumulate; see `virtualbatch.keras.plan`."""
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
        purge_model_variables=False,
    )
    rows = rows_of_one_device(common_rows(array_leaves(batch)) or 0)
    return planned(partial(_step_of, model, found), state, spread(batch), rows, memory_limit)


def _refuse_nnx(model: keras.Model) -> None:
    """Refuses Keras' NNX mode, in which variables are not Keras' own.

    Raises:
        NotImplementedError: the mode is on.
    """
    del model
    if keras.config.is_nnx_enabled():
        raise NotImplementedError(
            "accumulate works on Keras' own variables. Got Keras with its NNX mode enabled. "
            "Unset KERAS_NNX_ENABLED."
        )


def _sizes(rows: int, size: int) -> list[int]:
    """Rows of each micro-batch: all of one size, and a remainder."""
    return [min(size, rows - start) for start in range(0, rows, size)]


BACKEND = Backend(
    refuse=_refuse_nnx,
    step=JaxStep,
    make_train_function=make_train_function,
    plan=plan,
    build=build_symbolically,
    program=JaxProgram,
    cut=_sizes,
    is_concrete=lambda value: not isinstance(value, jax.core.Tracer),
    kept=lambda model: [],
    evaluate=evaluated,
)
