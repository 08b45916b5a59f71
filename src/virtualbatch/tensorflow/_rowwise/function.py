"""A function of rows that runs in micro-batches, and differentiates like the function itself."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._batch import Segment, as_tensors, segments, specs
from virtualbatch.tensorflow._rowwise.node import differentiable
from virtualbatch.tensorflow._rowwise.outputs import check_outputs
from virtualbatch.tensorflow._rowwise.passes import Passes, Shared
from virtualbatch.tensorflow._rowwise.program import Reached, reached, traced_alone
from virtualbatch.tensorflow._rowwise.recording import is_recording
from virtualbatch.tensorflow._rowwise.state import State
from virtualbatch.window.fingerprint import plain_values
from virtualbatch.window.tree import builder, common_rows
from virtualbatch.window.window import Window


class Rowwise:
    """What `virtualbatch.tensorflow.rowwise` returns.

    Args:
        fn: (batch, *shared) -> outputs.
        microbatch_size: checked, or None.
        accumulation_steps: checked, or None.
        check: whether the first call proves that each row stands alone.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        microbatch_size: int | None,
        accumulation_steps: int | None,
        check: bool,
    ):
        self.fn = fn
        self.sizes = microbatch_size, accumulation_steps
        self._check = check
        # By what a trace depends on.
        self._reached: dict[str, Reached] = {}

    def __call__(self, batch: Any, *shared: Any) -> Any:
        """The outputs for all rows of a batch, or of a Window."""
        if tf.executing_eagerly():
            return self._eagerly(batch, shared)
        # AutoGraph does not look into this library, but must go on converting what the user wrote.
        autograph = tf.__internal__.autograph
        fn = autograph.tf_convert(self.fn, autograph.control_status_ctx())
        return self._in_graph(fn, batch, shared)

    @tf.autograph.experimental.do_not_convert
    def _in_graph(self, fn: Callable[..., Any], batch: Any, shared: Sequence[Any]) -> Any:
        batch = batch if isinstance(batch, Window) else as_tensors(batch)
        cut = self._cut(batch)
        if _is_whole(batch, cut):
            return fn(batch, *shared)
        given = Shared(shared)
        passes = Passes(fn, given)
        traced = passes.traced(cut)
        graphs = {id(call.graph): call.graph for x in traced for call in (x.first, x.call)}
        found = reached(list(graphs.values()))
        return differentiable(passes, given, batch, cut, traced, found.trained, found.written)

    def _eagerly(self, batch: Any, shared: Sequence[Any]) -> Any:
        cut = self._cut(batch)
        if _is_whole(batch, cut) or not (is_recording() or isinstance(batch, Window)):
            return self.fn(batch, *shared)
        given = Shared(shared)
        found = self._learnt(cut[0], given)
        passes = Passes(self.fn, given)
        traced = passes.traced(cut)
        return differentiable(passes, given, batch, cut, traced, found.trained, found.changing)

    def _cut(self, batch: Any) -> list[Segment]:
        return segments(batch, *((None, None) if isinstance(batch, Window) else self.sizes))

    def _learnt(self, first: Segment, shared: Shared) -> Reached:
        """The variables that the function reaches, by a trace of it, once per structure."""
        microbatch = as_tensors(first.get(0))
        key = repr((specs(microbatch, 1), shared.specs, plain_values(self.fn)))
        if key not in self._reached:
            before = State.now([])
            graph, outputs = traced_alone(
                self.fn, specs(microbatch), shared.arguments(shared.specs)
            )
            before.put_back()
            self._reached[key] = reached([graph])
            leaves: list[tuple[str, Any]] = []
            builder(outputs, "output", leaves, lists=False)
            check_outputs(leaves, first.rows(0))
        return self._reached[key]


def _is_whole(batch: Any, cut: Sequence[Segment]) -> bool:
    """Whether there is nothing to cut."""
    count = cut[0].count
    return not isinstance(batch, Window) and len(cut) == 1 and isinstance(count, int) and count == 1
