"""Planning on TensorFlow: windows are run, in a graph, and their peak and time are measured."""

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.patience import TimeBudget
from virtualbatch.plan.plan import Plan, parse_limit
from virtualbatch.plan.search import ROOM_FOR_TOOLS, Question, Search
from virtualbatch.plan.timing import Timing
from virtualbatch.tensorflow._plan.memory import ERRORS, left_bytes
from virtualbatch.tensorflow._plan.peak import PeakMemory, Watched

# size -> function of a batch that computes a window, to be made a graph.
Window = Callable[[int], Callable[[Any], Any]]


def planned(
    window: Window, batch: Any, rows: int, held: int, memory_limit: int | str | None
) -> Plan:
    """The plan for a batch.

    Args:
        window: microbatch_size -> the function that computes a window with it.
        batch: nested structure of tensors and other leaves.
        rows: its rows.
        held: bytes of what exists before a window: variables and the batch.
        memory_limit: bytes, a text, or None.

    Raises:
        ValueError: not even one row fits, or a limit does not parse.
        NotImplementedError: neither a GPU nor the kernel tells a peak.
    """
    left = left_bytes()
    limit = parse_limit(memory_limit, None if left is None else left + held)
    found = _searched(window, batch, rows, held, limit)
    _forget_graphs()
    return found


def _searched(window: Window, batch: Any, rows: int, held: int, limit: int) -> Plan:
    """The plan for a limit in bytes; what it made is referred to by nothing else afterwards."""
    search = Search(rows, limit, remainder=False)
    peaks: dict[int, int] = {}
    windows: dict[int, Watched] = {}
    peak = _measuring(lambda: _Program(window(1), batch)())
    if peak is None:
        search.only_try()
    patience = TimeBudget()
    while (question := search.ask()) is not None:
        if patience.is_over(question):
            search.skip(question)
            continue
        size = question.microbatch_size
        try:
            if question.kind == "trial" or peak is None:
                trial = Timing(_Program(window(size), batch, eager=True))
                search.tell(question, trial.seconds())
                continue
            if size not in windows:
                windows[size] = Watched(_Program(window(size), batch), peak)
            found = windows[size]
            if size not in peaks:
                peaks[size] = held + found.peak_bytes()
                search.tell(Question("memory", size), peaks[size])
            # A size that was only predicted to fit may need a little more.
            if question.kind == "time" and peaks[size] <= limit:
                search.tell(question, found.timing.seconds())
                # Of more runs, so it may have grown.
                peaks[size] = held + found.peak_bytes()
                search.tell(Question("memory", size), peaks[size])
        except ERRORS.kinds as error:
            if not ERRORS.is_possible(error):
                raise
            search.tell(question, None)
    return search.plan()


def _forget_graphs() -> None:
    """Frees what graphs that nothing refers to still hold, because they refer to themselves.

    Small as it is, it lies between the free pieces of TensorFlow's allocator, which then gives out
    larger ones than asked for, and the next window would need more.
    """
    gc.collect()


def _measuring(first: Callable[[], float]) -> PeakMemory | None:
    """What measures windows, after a first one; None where memory is too short for either.

    What TensorFlow loads once, and what its allocator keeps of a window, is no window's need.
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
    found = [x for x in tf.nest.flatten((variables, batch)) if hasattr(x, "dtype")]
    shapes = [(tf.TensorShape(x.shape), tf.as_dtype(x.dtype)) for x in found]
    return sum(shape.num_elements() * dtype.size for shape, dtype in shapes)


class _Program:
    """A window as a graph, or run eagerly, and the variables that it could change."""

    def __init__(self, window: Callable[[Any], Any], batch: Any, eager: bool = False):
        self._batch = batch
        function = tf.function(window)
        self._function = window if eager else function
        graph = function.get_concrete_function(batch).graph
        self._changed = list(graph.variables) if _assigns(graph) else []

    def __call__(self) -> float:
        """Runs the window and waits for it; every variable is as before.

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
