"""A compiled train step on JAX whose optimizer changes nothing."""

from collections.abc import Callable
from typing import Any

import keras
from jax.extend.core import ClosedJaxpr, Literal

from virtualbatch.jax._compiled_quickly import compiled_quickly
from virtualbatch.keras._backend import Ran
from virtualbatch.keras._jax.devices import on_every_device
from virtualbatch.keras._jax.stateless import State


class JaxProgram:
    """See `virtualbatch.keras._backend.Program`.

    If a loss does not reach a variable, JAX returns zeros as its gradient. These zeros depend on no
    input of the program. So the program shows which gradients are real.

    Args:
        model: a model that is built and compiled.
        step: (state, batch) -> (logs, state).
    """

    def __init__(self, model: keras.Model, step: Any):
        self._model = model
        self._step = step
        self._program = compiled_quickly(self._run)
        self._reached: list[bool] | None = None

    def __call__(self, batch: Callable[[], Any], times: int) -> Ran:
        """See `Program`."""
        with on_every_device():
            return self._ran(batch(), times)

    def _ran(self, data: Any, times: int) -> Ran:
        model = self._model
        start = State(
            *model._get_jax_state(
                trainable_variables=True,
                non_trainable_variables=True,
                optimizer_variables=True,
                metrics_variables=True,
                purge_model_variables=False,
            )
        )
        if self._reached is None:
            program = self._program.trace(start, data).jaxpr
            self._reached = _depends(program)[: len(start.trainable)]
        gradients, logs, after = self._program(start, data)
        for _ in range(times - 1):
            given = start._replace(non_trainable=after.non_trainable)
            gradients, logs, after = self._program(given, data)
        found = [g if there else None for g, there in zip(gradients, self._reached, strict=True)]
        return Ran(found, logs, after.metrics, after.non_trainable)

    def _run(self, state: State, batch: Any) -> tuple[list[Any], Any, State]:
        optimizer = self._model.optimizer
        seen: list[Any] = []

        def stateless_apply(optimizer_variables: Any, gradients: Any, trainable: Any) -> Any:
            seen[:] = gradients
            return trainable, optimizer_variables

        vars(optimizer)["stateless_apply"] = stateless_apply
        try:
            logs, after = self._step(tuple(state), batch)
        finally:
            del vars(optimizer)["stateless_apply"]
        return seen, logs, State(*after)


def _depends(program: ClosedJaxpr) -> list[bool]:
    """Whether each output of a program depends on any of its inputs."""
    known = set(program.jaxpr.invars)
    for equation in program.jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in known for v in equation.invars):
            known.update(equation.outvars)
    return [not isinstance(v, Literal) and v in known for v in program.jaxpr.outvars]
