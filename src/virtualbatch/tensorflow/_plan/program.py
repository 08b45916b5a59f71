"""The plan of a program, and the planned size for a batch."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from virtualbatch.plan.auto import Auto, CurrentSize
from virtualbatch.plan.plan import Plan
from virtualbatch.tensorflow._arrays import as_tensors, named_arrays
from virtualbatch.tensorflow._batch import segments
from virtualbatch.tensorflow._plan.plan import held_bytes, planned
from virtualbatch.tensorflow._plan.sizes import signature, stand_in
from virtualbatch.tensorflow._remembered import remembered
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.tree import common_rows


def plan_of(program: Program, batch: Any, memory_limit: int | str | None) -> Plan:
    """The plan of a program, outside of graphs.

    Args:
        program: the loss, its weight and its variables, without statistics.
        batch: a batch, not a Window.
        memory_limit: as in `virtualbatch.tensorflow.plan`.
    """

    def window(microbatch_size: int) -> Callable[[Any], Any]:
        # Not tried again if memory runs out, because the search must know that.
        return lambda batch: _run(program.converted(), batch, microbatch_size)

    rows = common_rows(named_arrays(batch))
    if rows is None:
        raise ValueError("internal: an eager batch has no number of rows.")
    batch = as_tensors(batch)
    return planned(window, batch, rows, held_bytes(program.variables, batch), memory_limit)


def planned_size(program: Program, batch: Any, automatic: Any) -> CurrentSize:
    """The size for a batch, planned now if no plan covers the batch. In a graph: during the trace.

    Args:
        program: the loss, its weight and its variables.
        batch: a batch, not a Window.
        automatic: "auto" or an `Auto`.
    """
    sizes = automatic if isinstance(automatic, Auto) else remembered(program.variables).sizes
    found = signature(program, batch)
    graph = not tf.executing_eagerly()

    def make() -> Plan:
        # Outside the user's graph, if there is one. There the batch has no values.
        with tf.init_scope():
            given = stand_in(batch) if graph else batch
            return plan_of(program._replace(stats=False), given, sizes.memory_limit)

    return sizes.planned(found, make)


@tf.autograph.experimental.do_not_convert
def _run(program: Program, batch: Any, microbatch_size: int) -> Any:
    weighted = program.weight is not None
    return program.run(
        segments(batch, microbatch_size, None, weighted=weighted, counted=program.has_aux)
    )
