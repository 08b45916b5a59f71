"""Planning for Keras on JAX: what XLA says of a whole update, and how long it takes."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from virtualbatch.jax._plan.memory import ERRORS, left_bytes
from virtualbatch.jax._plan.plan import peak_bytes
from virtualbatch.plan import planner
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.planner import bytes_allowed
from virtualbatch.plan.retry import Memory
from virtualbatch.plan.timing import Timing
from virtualbatch.window.tree import array_leaves, common_rows

MEMORY = Memory(ERRORS, left_bytes)


def planned(
    step: Callable[[int], Callable[[Any, Any], Any]],
    state: Any,
    batch: Any,
    memory_limit: int | str | None,
) -> Plan:
    """The plan for a batch.

    Args:
        step: microbatch_size -> pure function (state, batch) -> (logs, state).
        state: of the model, as Keras' train function takes it; not changed.
        batch: the batch as that function takes it.
        memory_limit: bytes, a text, or None.
    """
    rows = common_rows(array_leaves(batch))
    if rows is None:
        raise ValueError("internal: a batch of JAX has no number of rows.")
    held = sum(x.nbytes for x in jax.tree.leaves((state, batch)) if hasattr(x, "nbytes"))
    return planner.planned(
        lambda size: _Update(step(size), state, batch, held),
        rows,
        held,
        bytes_allowed(memory_limit, held, MEMORY),
        ERRORS,
        remainder=False,
    )


def copied(state: Any) -> Any:
    """The same values in arrays that a program may overwrite."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), state)


class _Update:
    """The update of one size, as Keras compiles it."""

    def __init__(self, step: Callable[[Any, Any], Any], state: Any, batch: Any, held: int):
        self._state, self._batch, self._held = state, batch, held
        self._program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        self.timing = Timing(self._run)

    def peak_bytes(self) -> int:
        return max(0, peak_bytes(self._program) - self._held)

    def _run(self) -> float:
        state = jax.block_until_ready(copied(self._state))
        start = time.perf_counter()
        jax.block_until_ready(self._program(state, self._batch))
        return time.perf_counter() - start
