"""The two passes of a function of rows: its outputs, and later their gradient.

The first runs every micro-batch and keeps its outputs only. The second runs them again, each with
its rows of the outputs' gradient, and sums what comes back.
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
    """The arguments beside the batch, which every micro-batch gets whole.

    Args:
        arguments: what the user passed.

    Attributes:
        tensors: the tensors among them; all else stays as it is.
        specs: theirs.
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
        """The arguments with other tensors in place of theirs."""
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
        shared: the arguments beside the batch.

    Attributes:
        outputs: their structure, once the first pass has run or was traced.
    """

    def __init__(self, fn: Callable[..., Any], shared: Shared):
        self._fn = fn
        self._shared = shared
        self.outputs = Outputs()
        self._last: tuple[Sequence[Segment], list[Traced]] | None = None

    def graphs(self, cut: Sequence[Segment]) -> list[Any]:
        """The graphs of the first pass over these micro-batches, inside of a graph."""
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
        """The micro-batches with the first pass, in a graph traced once per shape."""
        if self._last is not None and self._last[0] is cut:
            return self._last[1]

        def step(index: Any, microbatch: Any, *given: Any) -> list[Any]:
            return self.outputs.tensors(self._run(microbatch, given), microbatch)

        with nothing_recorded():
            traced = trace(cut, step, extra=self._shared.specs)
        self._last = cut, traced
        return traced

    def _run(self, microbatch: Any, given: Sequence[Any]) -> Any:
        """The outputs for one micro-batch, of whose structure the function may take things out."""
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
            cut: the micro-batches of the first.
            cotangents: the gradient of each output that takes one.
            variables: whose gradient is wanted.
            shared: numbers of the shared tensors whose gradient is wanted.
            arrays: numbers of the arrays of the batch whose gradient is wanted.

        Returns:
            The gradients of the variables, of the shared tensors, and flat ones of the arrays.
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
    """The tensors of a leaf; None for what is no tensor, as a variable, which is read as it is."""
    if isinstance(leaf, tf.Tensor | tf.RaggedTensor | tf.SparseTensor | tf.IndexedSlices):
        return tf.nest.flatten(leaf, expand_composites=True)
    return None


def _entry(outputs: Sequence[Any]) -> Any:
    """A number that is there once the outputs are; what waits for it waits for the micro-batch."""
    entries = [tf.reduce_sum(tf.cast(x[:1], tf.float32)) for x in outputs if x.dtype.is_floating]
    return tf.add_n(entries) if entries else tf.zeros([])


def _with_all_rows(tensors: Sequence[Any], cut: Sequence[Segment]) -> list[Any]:
    """The tensors, which say how many rows they have if that is known."""
    counts = [segment.count * segment.rows(0) for segment in cut]
    if all(isinstance(count, int) for count in counts):
        for tensor in tensors:
            tensor.set_shape([sum(counts), *tensor.shape[1:]])
    return list(tensors)
