"""A function of rows that runs in micro-batches, and differentiates like the function itself."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import tensorflow as tf

from virtualbatch.plan.auto import Auto, CurrentSize, is_automatic
from virtualbatch.tensorflow._arrays import as_tensors
from virtualbatch.tensorflow._batch import segments, smaller_segments
from virtualbatch.tensorflow._checks import flat_leaves
from virtualbatch.tensorflow._replicas import refuse_planning_replicas, replicas
from virtualbatch.tensorflow._rowwise.attempts import Attempts
from virtualbatch.tensorflow._rowwise.inputs import read_variables
from virtualbatch.tensorflow._rowwise.node import differentiable
from virtualbatch.tensorflow._rowwise.passes import Passes, Shared
from virtualbatch.tensorflow._rowwise.program import reached
from virtualbatch.tensorflow._rowwise.recording import is_recording
from virtualbatch.tensorflow._rowwise.surrogate import Surrogates
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.window import Window, check_cut

# What a function returns: tensors with one entry per row, in any structure.
Outputs = TypeVar("Outputs")


class Rowwise(Generic[Outputs]):
    """The function that `virtualbatch.tensorflow.rowwise` returns.

    Args:
        fn: (batch, *shared) -> outputs.
        microbatch_size: a checked size, "auto", an `Auto`, or None.
        accumulation_steps: a checked number, or None.
        check: whether the first call proves that each row is computed from that row alone.
    """

    def __init__(
        self,
        fn: Callable[..., Outputs],
        microbatch_size: Any,
        accumulation_steps: int | None,
        check: bool,
    ):
        self.sizes = microbatch_size, accumulation_steps
        self._fn = fn
        self._check = check
        self._auto = microbatch_size if isinstance(microbatch_size, Auto) else Auto()
        self._surrogates = Surrogates(fn)

    def __call__(self, batch: Any, *shared: Any) -> Outputs:
        """The outputs for all rows of a batch, or of a Window."""
        flat_leaves("batch", batch)
        if isinstance(batch, Window):
            check_cut(batch, *self.sizes)
            batch = Window(map(read_variables, batch), sorted_rows=batch.sorted_rows)
        else:
            batch = read_variables(batch)
        if tf.executing_eagerly():
            return self._eagerly(batch, Shared(shared))
        # AutoGraph does not convert this library, but it must still convert the user's function.
        autograph = tf.__internal__.autograph
        fn = autograph.tf_convert(self._fn, autograph.control_status_ctx())
        return self._in_graph(fn, batch, Shared(shared))

    def certified(self, batch: Any, variables: Any) -> tuple[Program, Any]:
        """The surrogate loss that is certified in place of the function, and its batch.

        Raises:
            ValueError: the outputs are wrong, as in `Surrogates.certified`.
        """
        return self._surrogates.certified(batch, variables)

    @tf.autograph.experimental.do_not_convert
    def _in_graph(self, fn: Callable[..., Any], batch: Any, shared: Shared) -> Any:
        batch = batch if isinstance(batch, Window) else as_tensors(batch)
        cut = self._cut(batch, self._planned(batch, shared))
        if _is_whole(batch, cut):
            return fn(batch, *shared.arguments(shared.tensors))
        passes = Passes(fn, shared)
        found = reached(passes.graphs(cut))
        return differentiable(passes, shared, batch, cut, found, None)

    def _eagerly(self, batch: Any, shared: Shared) -> Any:
        if not is_recording() and not isinstance(batch, Window):
            return self._fn(batch, *shared.arguments(shared.tensors))
        planned = self._planned(batch, shared)
        cut = self._cut(batch, planned)
        if _is_whole(batch, cut):
            return self._fn(batch, *shared.arguments(shared.tensors))
        most = max(segment.rows(0) for segment in cut)
        size = planned or self._auto.asked(most)
        if size.rows < most:
            cut = smaller_segments(batch, size.rows)
        learnt = self._surrogates.learnt(cut[0].get(0), shared)
        if self._check:
            self._surrogates.prove(learnt, batch, cut, shared)
        attempts = Attempts(batch, size, learnt.reached)
        passes = Passes(self._fn, shared)
        return differentiable(passes, shared, batch, cut, learnt.reached, attempts)

    def _cut(self, batch: Any, planned: CurrentSize | None) -> list[Segment]:
        # Eagerly a replica without rows must not call the function.
        may_be_empty = replicas() > 1 and not tf.executing_eagerly()
        if isinstance(batch, Window):
            return segments(batch, None, None, may_be_empty=may_be_empty)
        size, steps = self.sizes if planned is None else (planned.rows, None)
        check_cut(batch, size, steps)
        return segments(batch, size, steps, may_be_empty=may_be_empty)

    def _planned(self, batch: Any, shared: Shared) -> CurrentSize | None:
        """The planned size; None if no size is to be planned."""
        if not is_automatic(self.sizes[0]):
            return None
        refuse_planning_replicas()
        return self._surrogates.planned(batch, shared, self._auto)


def _is_whole(batch: Any, cut: Sequence[Segment]) -> bool:
    """Whether the batch is one micro-batch."""
    count = cut[0].count
    return not isinstance(batch, Window) and len(cut) == 1 and isinstance(count, int) and count == 1
