"""The two passes of a function of rows: its outputs, and later their gradient.

The first pass runs every micro-batch and keeps only its outputs. The second pass runs them again,
each with its rows of the outputs' gradient, and sums the gradients.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._batch import with_columns
from virtualbatch.tensorflow._gradients import add, finished, split_sparse, widened
from virtualbatch.tensorflow._loop import Output, Traced, bound, fold, trace
from virtualbatch.tensorflow._rowwise.inputs import tensors_of
from virtualbatch.tensorflow._rowwise.outputs import Outputs
from virtualbatch.tensorflow._rowwise.recording import nothing_recorded
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.window.tree import builder


class Shared:
    """All arguments except the batch. Every micro-batch gets them whole.

    Args:
        arguments: the arguments that the user passed.

    Attributes:
        tensors: the tensors among the arguments. Other leaves stay as they are.
        specs: the specs of these tensors.
    """

    def __init__(self, arguments: Sequence[Any]):
        leaves: list[tuple[str, Any]] = []
        self._build = builder(tuple(arguments), "shared", leaves, lists=False)
        self._leaves = [leaf for _, leaf in leaves]
        parts = [_parts(leaf) for leaf in self._leaves]
        self._counts = [None if found is None else len(found) for found in parts]
        self.tensors = [x for found in parts for x in found or ()]
        self.specs = [tf.TensorSpec(x.shape, x.dtype) for x in self.tensors]

    def arguments(self, tensors: Sequence[Any]) -> Any:
        """The arguments, with their tensors replaced."""
        given = iter(tensors)
        return self._build(
            [
                leaf
                if count is None
                else tf.nest.pack_sequence_as(leaf, list(islice(given, count)), True)
                for leaf, count in zip(self._leaves, self._counts, strict=True)
            ]
        )


class Passes:
    """The passes of one call.

    Args:
        fn: (micro-batch, *shared) -> outputs.
        shared: all arguments except the batch.

    Attributes:
        outputs: the structure of the outputs, once the first pass has run or was traced.
    """

    def __init__(self, fn: Callable[..., Any], shared: Shared):
        self._fn = fn
        self._shared = shared
        self.outputs = Outputs()
        self._last: tuple[Sequence[Segment], list[Traced]] | None = None

    def graphs(self, cut: Sequence[Segment]) -> list[Any]:
        """The graphs of the first pass over these micro-batches. Call it inside a graph."""
        functions: list[Any] = [x for t in self._traced(cut) for x in (t.first, t.call)]
        return list({id(function): function.graph for function in functions}.values())

    def first(self, cut: Sequence[Segment]) -> list[Any]:
        """Runs the first pass.

        Returns:
            The tensors of the outputs, each with the rows of all micro-batches in order.
        """
        with nothing_recorded():
            given = [bound(each, *self._shared.tensors) for each in self._traced(cut)]
            rows = fold(given, lambda _, found: Output([_entry(found)], found), add).rows
        return _with_all_rows(rows, cut)

    def _traced(self, cut: Sequence[Segment]) -> list[Traced]:
        """The micro-batches with the first pass as their step. In a graph it is traced here."""
        if self._last is not None and self._last[0] is cut:
            return self._last[1]

        def step(index: Any, microbatch: Any, *given: Any) -> list[Any]:
            return self.outputs.tensors(self._run(microbatch, given), microbatch)

        with nothing_recorded():
            traced = trace(cut, step, extra=self._shared.specs)
        self._last = cut, traced
        return traced

    def _run(self, microbatch: Any, given: Sequence[Any]) -> Any:
        """The outputs for one micro-batch. The function gets a structure that it may change."""
        own = tf.nest.map_structure(lambda leaf: leaf, microbatch)
        return self._fn(own, *self._shared.arguments(given))

    def second(
        self,
        cut: Sequence[Segment],
        cotangents: Sequence[Any],
        variables: Sequence[Any],
        shared: Sequence[int],
        arrays: Sequence[int],
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """Runs the second pass.

        Args:
            cut: the micro-batches of the first pass, or smaller ones.
            cotangents: the gradient of each output that takes a gradient.
            variables: the variables whose gradient is needed.
            shared: the numbers of the shared tensors whose gradient is needed.
            arrays: the numbers of the arrays of the batch whose gradient is needed.

        Returns:
            The gradients of the variables, of the shared tensors, and of the arrays. Gradients of
            arrays are flat.
        """
        wanted = [self._shared.tensors[k] for k in shared]
        count = len(variables) + len(wanted)

        def step(index: Any, pair: Any, *given: Any) -> tuple[Any, Any, Any]:
            microbatch, upstream = pair
            inputs = [given[k] for k in shared]
            rows = [tensors_of(microbatch)[k] for k in arrays]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([*variables, *inputs, *rows])
                outputs = self.outputs.tensors(self._run(microbatch, given), microbatch)
                chosen = [x for x, y in zip(outputs, self.outputs.takes_gradient, strict=True) if y]
            gradients = tape.gradient(chosen, [*variables, *inputs, *rows], upstream)
            of_rows = [
                tf.reshape(tf.zeros_like(x) if g is None else tf.convert_to_tensor(g), [-1])
                for x, g in zip(rows, gradients[count:], strict=True)
            ]
            return *split_sparse([widened(x, 1.0) for x in gradients[:count]]), of_rows

        pairs = with_columns(cut, cotangents)
        given = [
            bound(each, *self._shared.tensors)
            for each in trace(pairs, step, extra=self._shared.specs)
        ]
        sums, rows = fold(given, lambda _, found: Output(found[0], [*found[1], *found[2]]), add)
        flat = finished(sums, rows[: 2 * count], [*variables, *wanted])
        return flat[: len(variables)], flat[len(variables) :], list(rows[2 * count :])


def _parts(leaf: Any) -> list[Any] | None:
    """The tensors of a leaf; None for a leaf that is no tensor, such as a variable."""
    if isinstance(leaf, tf.Tensor | tf.RaggedTensor | tf.SparseTensor | tf.IndexedSlices):
        return tf.nest.flatten(leaf, expand_composites=True)
    return None


def _entry(outputs: Sequence[Any]) -> Any:
    """A number that is computed from the outputs. To wait for it is to wait for the micro-batch."""
    entries = [tf.reduce_sum(tf.cast(x[:1], tf.float32)) for x in outputs if x.dtype.is_floating]
    return tf.add_n(entries) if entries else tf.zeros([])


def _with_all_rows(tensors: Sequence[Any], cut: Sequence[Segment]) -> list[Any]:
    """The tensors, with the number of rows set in their shape if it is known."""
    counts = [segment.count * segment.rows(0) for segment in cut]
    if all(isinstance(count, int) for count in counts):
        for tensor in tensors:
            tensor.set_shape([sum(counts), *tensor.shape[1:]])
    return list(tensors)
