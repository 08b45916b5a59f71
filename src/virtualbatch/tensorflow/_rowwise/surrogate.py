"""An ordinary loss that represents a function of rows in trials, certificates and plans.

The loss multiplies the function's outputs by fixed numbers and sums the products over rows. So it
is a sum over rows exactly if the function computes each row from that row alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import tensorflow as tf

from virtualbatch.plan.auto import Auto, CurrentSize
from virtualbatch.tensorflow._arrays import as_tensors, named_arrays, specs
from virtualbatch.tensorflow._batch import segments
from virtualbatch.tensorflow._certify.first_window import prove_first_window
from virtualbatch.tensorflow._plan.program import planned_size
from virtualbatch.tensorflow._rowwise.outputs import (
    Outputs,
    check_outputs,
    places_of,
    takes_gradient,
)
from virtualbatch.tensorflow._rowwise.passes import Shared
from virtualbatch.tensorflow._rowwise.program import Reached, reached, traced_alone
from virtualbatch.tensorflow._rowwise.state import State
from virtualbatch.tensorflow._segment import Segment
from virtualbatch.tensorflow._weights import window_shares
from virtualbatch.tensorflow._window import Program
from virtualbatch.window.fingerprint import plain_values
from virtualbatch.window.shares import accumulator_dtype
from virtualbatch.window.terms import SUM
from virtualbatch.window.tree import builder, common_rows
from virtualbatch.window.window import Window

# The most traces of functions that differ only by plain values.
_MOST_TRACES = 4


class _Given:
    """The function, with the shared arguments of the present call."""

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self._arguments: Sequence[Any] = ()

    def __call__(self, batch: Any) -> Any:
        return self._fn(batch, *self._arguments)

    @contextmanager
    def called_with(self, arguments: Sequence[Any]) -> Iterator[None]:
        """Holds the shared arguments inside the context, and not longer."""
        self._arguments = arguments
        try:
            yield
        finally:
            self._arguments = ()


class Learnt:
    """What a trace of a function showed.

    Args:
        reached: the variables that the function reaches.
        outputs: the traced outputs, each with the expression that reaches it.
        given: the function as its surrogate loss calls it.
    """

    def __init__(self, reached: Reached, outputs: Sequence[tuple[str, Any]], given: _Given):
        self.reached = reached
        self.given = given
        self._places = places_of(outputs)
        self._outputs = [
            (place, tf.as_dtype(leaf.dtype))
            for place, leaf in outputs
            if leaf is not None and takes_gradient(tf.as_dtype(leaf.dtype))
        ]

    @cached_property
    def tried(self) -> Program | None:
        """The loss that is tried; None if no output can have a gradient."""
        # Tensors, not variables: a tape of the user would watch variables.
        factors = [tf.ones([], _wide(dtype)) for _, dtype in self._outputs]
        return self._compared(factors, self.reached.trained)

    def certified(self, variables: Any) -> Program | None:
        """The loss that is certified; None if no output can have a gradient."""
        factors = [
            tf.Variable(tf.ones([], _wide(dtype)), name=_name(place))
            for place, dtype in self._outputs
        ]
        return self._compared(factors, variables)

    def _compared(self, factors: Sequence[Any], variables: Any) -> Program | None:
        """A loss whose gradients also show the function's outputs.

        Each output has a factor. The gradient of that factor is the sum of the output's products.
        """
        if not factors:
            return None
        return Program(self._loss(factors), [factors, variables], SUM, has_aux=False, stats=False)

    @cached_property
    def planned(self) -> Program | None:
        """The loss that is planned; None if there is no gradient to measure."""
        variables = self.reached.trained
        if not self._outputs or not variables:
            return None
        loss_fn = self._loss([1.0] * len(self._outputs))
        return Program(loss_fn, variables, SUM, has_aux=False, stats=False)

    def _loss(self, factors: Sequence[Any]) -> Callable[[Any], Any]:
        """The loss, a function of a batch as `_numbered` returns it."""
        dtypes = [_wide(dtype) for _, dtype in self._outputs]
        widest = max(dtypes, key=lambda dtype: dtype.size)
        given, places = self.given, self._places

        def loss_fn(pair: Any) -> Any:
            batch, numbers = pair
            outputs = Outputs(places)
            tensors = outputs.tensors(given(batch), batch)
            chosen = [x for x, flag in zip(tensors, outputs.takes_gradient, strict=True) if flag]
            total = tf.zeros([], widest)
            for k, (x, dtype) in enumerate(zip(chosen, dtypes, strict=True)):
                real = tf.math.real(x) + tf.math.imag(x) if x.dtype.is_complex else x
                products = tf.cast(real, dtype) * _cotangent(numbers, real, k, dtype)
                total += tf.cast(tf.reduce_sum(products) * factors[k], widest)
            return total

        return loss_fn


class Surrogates:
    """The losses of a function, one for each structure of batches.

    Args:
        fn: (batch, *shared) -> outputs.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self._learnt: dict[str, dict[tuple[str, ...], Learnt]] = {}

    def learnt(self, microbatch: Any, shared: Shared) -> Learnt:
        """What a trace of the function shows. Each structure is traced once, outside of graphs.

        Args:
            microbatch: a micro-batch whose rows are known.
            shared: the other arguments.

        Raises:
            ValueError: the function or its outputs are refused, as in `reached` and
                `check_outputs`.
        """
        microbatch = as_tensors(microbatch)
        known = self._learnt.setdefault(repr((specs(microbatch, 1), shared.specs)), {})
        # With other plain values, such as flags, a function may do something else.
        values = plain_values(self._fn)
        if values not in known:
            if len(known) >= _MOST_TRACES:
                # Some value changes at each call, such as a step number.
                return next(reversed(known.values()))
            known[values] = self._traced(microbatch, shared)
        return known[values]

    def prove(self, learnt: Learnt, batch: Any, cut: Sequence[Segment], shared: Shared) -> None:
        """Checks once, on a few rows, that each output depends on its own row alone.

        Args:
            learnt: what a trace of the function showed.
            batch: a batch, or a Window.
            cut: the micro-batches.
            shared: the other arguments.

        Raises:
            ValueError: some output depends on other rows.
        """
        if learnt.tried is None:
            return
        pairs = _numbered(batch, [segment.rows(0) for segment in cut])
        shares = window_shares(cut, SUM)
        with learnt.given.called_with(shared.arguments(shared.tensors)):
            prove_first_window(learnt.tried, pairs, cut, shares, learnt.reached.changing)

    def certified(self, batch: Any, variables: Any) -> tuple[Program, Any]:
        """The loss that is certified in place of the function, and its batch.

        Raises:
            ValueError: no output can have a gradient.
        """
        (whole,) = segments(batch, None, 1)
        program = self.learnt(whole.get(0), Shared(())).certified(variables)
        if program is None:
            raise ValueError(
                "A certificate compares gradients. Got a function whose outputs have none. Return "
                "floating tensors."
            )
        return program, _numbered(batch, [whole.rows(0)])

    def planned(self, batch: Any, shared: Shared, sizes: Auto) -> CurrentSize:
        """The size for a batch, planned now if no plan covers the batch.

        Raises:
            ValueError: the function has no gradient to measure, or a graph does not know the
                shapes of the batch.
        """
        is_graph = not tf.executing_eagerly()
        rows = common_rows(named_arrays(batch))
        if rows is None:
            raise ValueError(
                'microbatch_size="auto" needs fully known shapes while a graph is traced. Got an '
                "unknown number of rows. Pass a number."
            )
        # Outside the user's graph, if there is one. There shared tensors have no values.
        with tf.init_scope():
            learnt = self.learnt(batch, shared)
            zeros = [tf.zeros(spec.shape, spec.dtype) for spec in shared.specs]
        if learnt.planned is None:
            raise ValueError(
                'microbatch_size="auto" measures gradients of variables. Got a function that uses '
                "none. Pass a number."
            )
        with learnt.given.called_with(shared.arguments(zeros if is_graph else shared.tensors)):
            return planned_size(learnt.planned, _numbered(batch, [rows]), sizes)

    def _traced(self, microbatch: Any, shared: Shared) -> Learnt:
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
        return Learnt(reached([graph]), leaves, _Given(self._fn))


def _numbered(batch: Any, rows: Sequence[int]) -> Any:
    """A pair of a batch and the numbers of its rows; for a Window, a Window of such pairs.

    Args:
        batch: a batch, or a Window.
        rows: the rows of each micro-batch.
    """
    if not isinstance(batch, Window):
        return batch, tf.range(sum(rows))
    stops = [sum(rows[: k + 1]) for k in range(len(rows))]
    pairs = zip(batch, stops, rows, strict=True)
    return Window([(microbatch, tf.range(stop - n, stop)) for microbatch, stop, n in pairs])


def _cotangent(numbers: Any, like: Any, output: int, dtype: tf.DType) -> Any:
    """Irregular numbers between -1 and 1, one for each entry of an output.

    They depend on the number of the row, so a row has the same numbers in every cut.
    """
    inner = tf.reshape(tf.range(tf.size(like[0])), tf.shape(like)[1:])
    rows = tf.reshape(numbers, [-1, *[1] * (len(like.shape) - 1)])
    row, place = (tf.cast(x, tf.float64) for x in (rows, inner[None]))
    return tf.cast(tf.cos(1 + output + 2.399963 * row**2 + 1.324718 * place), dtype)


def _wide(dtype: tf.DType) -> tf.DType:
    return tf.as_dtype(accumulator_dtype(dtype.real_dtype.name))


def _name(place: str) -> str:
    """A name that TensorFlow accepts for a variable."""
    return "".join(x if x.isalnum() else "_" for x in place).strip("_")
