"""Planning on TensorFlow: windows run in a graph, and their peak and time are measured."""

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from virtualbatch.plan import planner
from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.planner import bytes_allowed
from virtualbatch.plan.retry import Memory
from virtualbatch.plan.search import ROOM_FOR_TOOLS
from virtualbatch.plan.timing import Timing
from virtualbatch.tensorflow._plan.memory import ERRORS, left_bytes
from virtualbatch.tensorflow._plan.peak import PeakMemory, Watched

# size -> function of a batch that computes a window, and that will be made a graph.
Window = Callable[[int], Callable[[Any], Any]]


def planned(
    window: Window, batch: Any, rows: int, held: int, memory_limit: int | str | None
) -> Plan:
    """The plan for a batch.

    Args:
        window: microbatch_size -> the function that computes a window with it.
        batch: nested structure of tensors and other leaves.
        rows: the rows of the batch.
        held: bytes of variables and the batch, which exist before a window.
        memory_limit: bytes, a text, or None.

    Raises:
        ValueError: not even one row fits, or the limit does not parse.
        NotImplementedError: neither a GPU nor the kernel reports a peak.
    """
    limit = bytes_allowed(memory_limit, held, Memory(ERRORS, left_bytes))
    found = _searched(window, batch, rows, held, limit)
    _forget_graphs()
    return found


def _searched(window: Window, batch: Any, rows: int, held: int, limit: int) -> Plan:
    """The plan for a limit in bytes. When it returns, nothing else refers to the graphs it made."""
    peak = _measuring(lambda: _Program(window(1), batch)())

    def watched(size: int) -> Watched:
        if peak is None:
            raise RuntimeError("internal: peaks are not asked for where nothing tells them.")
        return Watched(_Program(window(size), batch), peak)

    return planner.planned(
        watched,
        rows,
        held,
        limit,
        ERRORS,
        remainder=False,
        trial=lambda size: Timing(_Program(window(size), batch, eager=True)),
        tells_peaks=peak is not None,
    )


def _forget_graphs() -> None:
    """Frees graphs that nothing else refers to. They refer to themselves, so `gc` must free them.

    Their memory is small, but it lies between the free pieces of TensorFlow's allocator. The
    allocator then gives out larger pieces than needed, and the next window would need more memory.
    """
    gc.collect()


def _measuring(first: Callable[[], float]) -> PeakMemory | None:
    """The measurement of peaks, made after a first window; None if there is too little memory.

    The first window takes what TensorFlow loads once and what its allocator keeps. That memory must
    not count as the need of a window.
    """
    if host_memory().left_bytes < ROOM_FOR_TOOLS:
        return None
    try:
        first()
    except ERRORS.kinds as error:
        if not ERRORS.is_possible(error):
            raise
        return None
    return PeakMemory()


def held_bytes(variables: Any, batch: Any) -> int:
    """Bytes of variables and of the arrays of a batch."""
    parts = tf.nest.flatten((variables, batch), expand_composites=True)
    found = [x for x in parts if hasattr(x, "dtype")]
    shapes = [(tf.TensorShape(x.shape), tf.as_dtype(x.dtype)) for x in found]
    return sum(shape.num_elements() * dtype.size for shape, dtype in shapes)


class _Program:
    """A window, as a graph or eager, and the variables that it may change."""

    def __init__(self, window: Callable[[Any], Any], batch: Any, eager: bool = False):
        self._batch = batch
        function = tf.function(window)
        self._function = window if eager else function
        graph = function.get_concrete_function(batch).graph
        self._changed = list(graph.variables) if _assigns(graph) else []

    def __call__(self) -> float:
        """Runs the window and waits for it. Afterwards every variable is as before.

        Returns:
            Seconds.
        """
        before = [variable.numpy() for variable in self._changed]
        start = time.perf_counter()
        try:
            loss = tf.nest.flatten(self._function(self._batch))[0]
            np.asarray(loss)
            return time.perf_counter() - start
        finally:
            for variable, value in zip(self._changed, before, strict=True):
                variable.assign(value)


def _assigns(graph: Any) -> bool:
    """Whether a graph writes to variables."""
    found = graph.as_graph_def()
    nodes = [*found.node, *(node for f in found.library.function for node in f.node_def)]
    return any("Assign" in node.op or "ScatterUpdate" in node.op for node in nodes)
