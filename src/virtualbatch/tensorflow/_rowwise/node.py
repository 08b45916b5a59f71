"""One node of differentiation: the first pass is its value, the second pass is its gradient."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._rowwise.attempts import Attempts
from virtualbatch.tensorflow._rowwise.inputs import Inputs, rows_of
from virtualbatch.tensorflow._rowwise.passes import Passes, Shared
from virtualbatch.tensorflow._rowwise.program import Reached
from virtualbatch.tensorflow._rowwise.recording import has_tangent
from virtualbatch.tensorflow._rowwise.state import State
from virtualbatch.tensorflow._segment import Segment


def differentiable(
    passes: Passes,
    shared: Shared,
    batch: Any,
    cut: Sequence[Segment],
    found: Reached,
    attempts: Attempts | None,
) -> Any:
    """The outputs for all rows, whose gradient is the second pass.

    Args:
        passes: the passes of this call.
        shared: all arguments except the batch.
        batch: the batch, or a Window.
        cut: the micro-batches.
        found: the variables that the function reaches.
        attempts: runs passes eagerly; None in a graph.

    Returns:
        The outputs, in the structure that the function returns.

    Raises:
        ValueError: an output is wrong, as in `Outputs.tensors`; or a ForwardAccumulator watches a
            tensor that the function uses.
    """
    trained, watched = found.trained, found.watched
    columns = rows_of(batch), [[x] for x in shared.tensors], [[tf.identity(v)] for v in watched]
    inputs = [Inputs(each) for each in columns]
    tensors = [x for each in inputs for x in each.tensors]
    _refuse_tangents([*map(tf.identity, trained), *tensors])
    changing = found.written if attempts is None else found.changing
    before = State.now(changing)
    if attempts is None:
        outputs = passes.first(cut)
    else:
        outputs, cut = attempts.first(passes.first, cut, before)
    drawn = before.is_drawn_from()
    flags = passes.outputs.takes_gradient
    cells = [x for x, flag in zip(outputs, flags, strict=True) if flag]
    if not cells:
        return passes.outputs.structure(outputs)

    @tf.custom_gradient
    def node(*entered: Any) -> Any:
        for variable in trained:
            # A tape watches a variable when it is read, and reads in the passes are not recorded.
            tf.identity(variable)

        def grad(*cotangents: Any, variables: Sequence[Any] = ()) -> Any:
            asked = [each.asked() for each in inputs]
            count = len(variables)

            def second(*cotangents: Any) -> tuple[list[Any], list[Any]]:
                now = State.now(changing)
                before.put_back()
                wanted = [*variables, *(watched[k] for k in asked[2])]

                def run(cut: Sequence[Segment]) -> Any:
                    return passes.second(cut, cotangents, wanted, asked[1], asked[0])

                found = run(cut) if attempts is None else attempts.second(run, cut, before, drawn)
                now.put_back()
                of_variables, of_shared, of_rows = found
                gradients = of_rows, of_shared, of_variables[count:]
                each = zip(inputs, asked, gradients, strict=True)
                of_inputs = [g for x, numbers, y in each for g in x.gradients(numbers, y)]
                return of_inputs, of_variables[:count]

            run = second if tf.executing_eagerly() else _own_graph(second)
            of_inputs, of_variables = run(*cotangents)
            return (of_inputs, of_variables) if variables else of_inputs

        return cells, grad

    results = iter(node(*tensors))
    return passes.outputs.structure(
        [next(results) if flag else x for x, flag in zip(outputs, flags, strict=True)]
    )


def _own_graph(second: Any) -> Any:
    """The second pass as a `tf.function`, so that its writes to variables run.

    If a tape outside a graph asks for the gradient, only operations that the gradient needs run.
    """
    return tf.function(second, autograph=False)


def _refuse_tangents(tensors: Sequence[Any]) -> None:
    if has_tangent(tensors):
        raise ValueError(
            "A rowwise function has derivatives by tf.GradientTape. "
            "Got a call inside tf.autodiff.ForwardAccumulator. Nest two tapes instead."
        )
