"""Plans for Keras on JAX: XLA reports the memory of a whole update, and its time is measured."""

import math
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

MEMORY = Memory(ERRORS, left_bytes)


def planned(
    step: Callable[[int], Callable[[Any, Any], Any]],
    state: Any,
    batch: Any,
    rows: int,
    memory_limit: int | str | None,
) -> Plan:
    """The plan for a batch.

    Args:
        step: microbatch_size -> pure function (state, batch) -> (logs, state).
        state: the state of the model, as Keras' train function takes it. It is not changed.
        batch: the batch, as Keras' train function takes it.
        rows: its rows on one device.
        memory_limit: bytes, a text, or None.
    """
    held = sum(map(_bytes_of_one_device, jax.tree.leaves((state, batch))))
    return planner.planned(
        lambda size: _Update(step(size), state, batch, held),
        rows,
        held,
        bytes_allowed(memory_limit, held, MEMORY),
        ERRORS,
        remainder=False,
    )


def _bytes_of_one_device(leaf: Any) -> int:
    """The bytes of a program's argument that one device holds."""
    if not hasattr(leaf, "nbytes"):
        return 0
    if not isinstance(leaf, jax.Array):
        return int(leaf.nbytes)
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def copied(state: Any) -> Any:
    """The same values in arrays that a program may overwrite."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), state)


class _Update:
    """An update with one micro-batch size, compiled as Keras does."""

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
