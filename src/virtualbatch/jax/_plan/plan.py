"""Planning on JAX: the memory of a window as XLA reports it, and its time.

To know the memory of a window, it is compiled and not run. After that a few sizes are timed, with
the compiled programs, if there is data to run them on.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from virtualbatch.jax._arrays import is_array
from virtualbatch.jax._plan.memory import ERRORS, left_bytes
from virtualbatch.jax._rows import rows_of
from virtualbatch.plan import planner
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.planner import bytes_allowed
from virtualbatch.plan.retry import Memory
from virtualbatch.plan.timing import Timing


def planned(
    window: Callable[[int], Callable[..., Any]],
    batch: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    memory_limit: int | str | None,
) -> Plan:
    """The plan for one call.

    Args:
        window: microbatch_size -> the function that computes a window with it.
        batch: the argument that is the batch.
        args: positional arguments of the call; arrays, or `jax.ShapeDtypeStruct`s in their place.
        kwargs: keyword arguments of the call, with the same types.
        memory_limit: bytes, a text, or None.

    Raises:
        ValueError: not even one row fits, the limit does not parse, or the call is traced.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
        raise ValueError(
            "plan must be called outside of jit, because it compiles and runs programs of its "
            "own. Got a call inside jit or another trace. Call it before, with arrays or "
            "jax.ShapeDtypeStruct."
        )
    rows = rows_of(batch, "batch")
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [leaf if is_array(leaf) else None for leaf in leaves]
    can_run = not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)

    def compiled(size: int) -> _Program:
        def run(arrays: list[Any]) -> Any:
            given = [x if y is None else y for x, y in zip(leaves, arrays, strict=True)]
            args, kwargs = jax.tree.unflatten(structure, given)
            return window(size)(*args, **kwargs)

        return _Program(jax.jit(run).lower(arrays).compile(), arrays)

    held = sum(leaf.nbytes for leaf in arrays if isinstance(leaf, jax.Array))
    return planner.planned(
        compiled,
        rows,
        # Nothing is held beside a program: XLA counts the arguments in its memory.
        0,
        bytes_allowed(memory_limit, held, Memory(ERRORS, left_bytes)),
        ERRORS,
        remainder=False,
        trial=lambda size: _timing(partial(window(size), *args, **kwargs)),
        can_run=can_run,
    )


class _Program:
    """The window of one size, compiled."""

    def __init__(self, program: Any, arrays: list[Any]):
        self._program = program
        self.timing = _timing(partial(program, arrays))

    def peak_bytes(self) -> int:
        return peak_bytes(self._program)


def peak_bytes(program: Any) -> int:
    """Bytes of the arguments, results and temporaries of a program."""
    found = program.memory_analysis()
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def _timing(window: Callable[[], Any]) -> Timing:
    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(window())
        return time.perf_counter() - start

    return Timing(run)
