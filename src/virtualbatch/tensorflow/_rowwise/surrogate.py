"""An ordinary loss with the derivatives of a function of rows: what is tried, certified, planned.

The products of its outputs with fixed numbers are added up over rows, so it is a sum over rows
exactly where the function works row by row.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.plan.auto import Auto, CurrentSize
from virtualbatch.tensorflow._batch import Segment, as_tensors, named_arrays, segments, specs
from virtualbatch.tensorflow._certify.first_window import prove_first_window
from virtualbatch.tensorflow._plan.program import planned_size
from virtualbatch.tensorflow._rowwise.outputs import Outputs, check_outputs, takes_gradient
from virtualbatch.tensorflow._rowwise.passes import Shared
from virtualbatch.tensorflow._rowwise.program import Reached, reached, traced_alone
from virtualbatch.tensorflow._rowwise.state import State
from virtualbatch.tensorflow._weights import window_shares
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.fingerprint import plain_values
from virtualbatch.window.shares import accumulator_dtype
from virtualbatch.window.terms import SUM
from virtualbatch.window.tree import builder, common_rows
from virtualbatch.window.window import Window


class _Given:
    """The function with the shared arguments of the call in which it is looked at."""

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self.arguments: Sequence[Any] = ()

    def __call__(self, batch: Any) -> Any:
        return self._fn(batch, *self.arguments)


class Learnt(NamedTuple):
    """What a trace of a function told.

    Fields:
        reached: its variables.
        outputs: the expressions that reach its outputs, and traces of these.
        given: the function as its loss calls it.
        program: that loss; None if no output can have a gradient.
    """

    reached: Reached
    outputs: list[tuple[str, Any]]
    given: _Given
    program: Program | None


class Surrogates:
    """The losses of a function, one for each structure of batches.

    Args:
        fn: (batch, *shared) -> outputs.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self._learnt: dict[str, Learnt] = {}

    def learnt(self, microbatch: Any, shared: Shared) -> Learnt:
        """What a trace of the function tells, made once per structure and outside of graphs.

        Args:
            microbatch: whose rows are known.
            shared: the other arguments.

        Raises:
            ValueError: see `reached` and `check_outputs`.
        """
        microbatch = as_tensors(microbatch)
        # A function may do something else with other values.
        key = repr((specs(microbatch, 1), shared.specs, plain_values(self._fn)))
        if key not in self._learnt:
            before = State.now([])
            graph, outputs = traced_alone(
                lambda rows, tensors: self._fn(rows, *shared.arguments(tensors)),
                specs(microbatch),
                shared.specs,
            )
            before.put_back()
            leaves: list[tuple[str, Any]] = []
            builder(outputs, "output", leaves, lists=False)
            check_outputs(leaves, common_rows(named_arrays(microbatch)))
            found, given = reached([graph]), _Given(self._fn)
            program = _loss(given, leaves, found.trained)
            self._learnt[key] = Learnt(found, leaves, given, program)
        return self._learnt[key]

    def prove(self, learnt: Learnt, batch: Any, cut: Sequence[Segment], shared: Shared) -> None:
        """Tries on a few rows whether each stands alone, if that was not done.

        Args:
            learnt: of the function.
            batch: a batch, or a Window.
            cut: its micro-batches.
            shared: the other arguments.

        Raises:
            ValueError: some row does not.
        """
        if learnt.program is None:
            return
        pairs = _numbered(batch, [segment.rows(0) for segment in cut])
        learnt.given.arguments = shared.arguments(shared.tensors)
        try:
            prove_first_window(learnt.program, pairs, cut, window_shares(cut, SUM), learnt.reached.changing)
        finally:
            learnt.given.arguments = ()

    def certified(self, batch: Any, variables: Any) -> tuple[Program, Any]:
        """The loss that is certified in place of the function, and its batch.

        Raises:
            ValueError: no output can have a gradient.
        """
        (whole,) = segments(batch, None, 1)
        learnt = self.learnt(whole.get(0), Shared(()))
        program = _loss(learnt.given, learnt.outputs, variables)
        if program is None:
            raise ValueError(
                "A certificate compares gradients. Got a function of which no output can have one. "
                "Return floating tensors."
            )
        return program, _numbered(batch, [whole.rows(0)])

    def planned(self, batch: Any, shared: Shared, sizes: Auto) -> CurrentSize:
        """The size in force for a batch, planned if no plan covers it."""
        is_graph = not tf.executing_eagerly()
        # Out of the user's graph, if there is one; then without its values.
        with tf.init_scope():
            learnt = self.learnt(batch, shared)
            zeros = [tf.zeros(spec.shape, spec.dtype) for spec in shared.specs]
        if learnt.program is None:
            raise ValueError(
                'microbatch_size="auto" measures gradients. Got a function of which no output can '
                "have one. Call it without rowwise."
            )
        learnt.given.arguments = shared.arguments(zeros if is_graph else shared.tensors)
        try:
            rows = common_rows(named_arrays(batch))
            return planned_size(learnt.program, _numbered(batch, [rows or 0]), sizes)
        finally:
            learnt.given.arguments = ()


def _loss(
    fn: Callable[[Any], Any], outputs: Sequence[tuple[str, Any]], variables: Any
) -> Program | None:
    """The loss of a function, to be run on what `_numbered` gives; None without a gradient."""
    found = [
        (place, leaf)
        for place, leaf in outputs
        if leaf is not None and takes_gradient(tf.as_dtype(leaf.dtype))
    ]
    if not found:
        return None
    # Their gradients are the outputs themselves, which are tried with it.
    factors = [tf.Variable(tf.ones([], _wide(x.dtype)), name=_name(place)) for place, x in found]

    def loss_fn(pair: Any) -> Any:
        batch, numbers = pair
        outputs = Outputs()
        tensors = outputs.tensors(fn(batch), batch)
        given = [x for x, flag in zip(tensors, outputs.takes_gradient, strict=True) if flag]
        total = tf.zeros([], max((x.dtype for x in factors), key=lambda dtype: dtype.size))
        for k, (x, factor) in enumerate(zip(given, factors, strict=True)):
            real = tf.math.real(x) + tf.math.imag(x) if x.dtype.is_complex else x
            wide = tf.cast(real, factor.dtype)
            product = tf.reduce_sum(wide * _cotangent(numbers, wide, k)) * factor
            total += tf.cast(product, total.dtype)
        return total

    return Program(loss_fn, [factors, variables], SUM, has_aux=False, stats=False)


def _numbered(batch: Any, rows: Sequence[int]) -> Any:
    """A batch, or a Window, beside the numbers of its rows.

    Args:
        batch: it.
        rows: of its micro-batches.
    """
    if not isinstance(batch, Window):
        return batch, tf.range(sum(rows))
    stops = [sum(rows[: k + 1]) for k in range(len(rows))]
    pairs = zip(batch, stops, rows, strict=True)
    return Window([(microbatch, tf.range(stop - n, stop)) for microbatch, stop, n in pairs])


def _cotangent(numbers: Any, like: Any, output: int) -> Any:
    """Numbers between -1 and 1 without order, one for each entry of an output.

    They follow from a row's number, so that a row has the same ones in every cut.
    """
    inner = tf.reshape(tf.range(tf.size(like[0])), tf.shape(like)[1:])
    rows = tf.reshape(numbers, [-1, *[1] * (len(like.shape) - 1)])
    phase = [tf.cast(x, tf.float64) for x in (rows, inner[None])]
    return tf.cast(tf.cos(1 + output + 2.399963 * phase[0] ** 2 + 1.324718 * phase[1]), like.dtype)


def _wide(dtype: tf.DType) -> tf.DType:
    return tf.as_dtype(accumulator_dtype(dtype.real_dtype.name))


def _name(place: str) -> str:
    """A name that TensorFlow takes for a variable."""
    return "".join(x if x.isalnum() else "_" for x in place).strip("_")
