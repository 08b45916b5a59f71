"""One node of differentiation: the first pass as its value, the second as its gradient."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.tensorflow._batch import Segment
from virtualbatch.tensorflow._rowwise.attempts import Attempts
from virtualbatch.tensorflow._rowwise.outputs import takes_gradient
from virtualbatch.tensorflow._rowwise.passes import Passes, Shared, tensors_of
from virtualbatch.tensorflow._rowwise.recording import has_tangent, is_recorded
from virtualbatch.tensorflow._rowwise.state import State
from virtualbatch.window.window import Window


def differentiable(
    passes: Passes,
    shared: Shared,
    batch: Any,
    cut: Sequence[Segment],
    trained: Sequence[Any],
    changing: Sequence[Any],
    attempts: Attempts | None,
) -> Any:
    """The outputs for all rows, whose gradient is the second pass.

    Args:
        passes: of this call.
        shared: its arguments beside the batch.
        batch: that batch, or a Window.
        cut: its micro-batches.
        trained: variables that the function reaches and that take a gradient.
        changing: variables that it may change.
        attempts: how passes are run eagerly; None in a graph.

    Returns:
        What the function returns.

    Raises:
        ValueError: see `Outputs.tensors`; or rows of a Window take a gradient, or a forward-mode
            derivative follows what the function uses.
    """
    tensors = _tensors_of_rows(batch)
    _refuse_tangents([*map(tf.identity, trained), *tensors, *shared.tensors])
    arrays, others = _wanted(tensors), _wanted(shared.tensors)
    before = State.now(changing)
    if attempts is None:
        found = passes.first(cut)
    else:
        found, cut = attempts.first(passes.first, cut, before)
    drawn = before.is_drawn_from()
    flags = passes.outputs.takes_gradient
    cells = [x for x, flag in zip(found, flags, strict=True) if flag]
    if not cells:
        return passes.outputs.structure(found)

    def second(*cotangents: Any, variables: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        now = State.now(changing)
        before.put_back()

        def run(cut: Sequence[Segment]) -> Any:
            return passes.second(cut, cotangents, variables, others, arrays)

        found = run(cut) if attempts is None else attempts.second(run, cut, before, drawn)
        now.put_back()
        of_variables, of_shared, of_rows = found
        return [*of_rows, *of_shared], of_variables

    @tf.custom_gradient
    def node(*inputs: Any) -> Any:
        for variable in trained:
            # A tape hears of a variable when it is read, and of no reading that it does not record.
            tf.identity(variable)

        def grad(*cotangents: Any, variables: Sequence[Any] = ()) -> Any:
            run = second if tf.executing_eagerly() else _own_graph(second)
            of_inputs, of_variables = run(*cotangents, variables=variables)
            return (of_inputs, of_variables) if variables else of_inputs

        return cells, grad

    results = iter(node(*[tensors[k] for k in arrays], *[shared.tensors[k] for k in others]))
    return passes.outputs.structure(
        [next(results) if flag else x for x, flag in zip(found, flags, strict=True)]
    )


def _own_graph(second: Any) -> Any:
    """The second pass as a function: it writes to variables, and a gradient has no place for that.

    Where a tape outside of a graph asks for its gradient, only what that needs is run.
    """

    def run(*cotangents: Any, variables: Sequence[Any]) -> Any:
        return tf.function(lambda *given: second(*given, variables=variables), autograph=False)(
            *cotangents
        )

    return run


def _wanted(tensors: Sequence[Any]) -> list[int]:
    """The numbers of those tensors whose gradient may be asked for.

    A graph may be differentiated from outside, which it does not know, and leaves out what nobody
    asks for.
    """
    is_graph = not tf.executing_eagerly()
    return [
        k for k, x in enumerate(tensors) if takes_gradient(x.dtype) and (is_graph or is_recorded(x))
    ]


def _tensors_of_rows(batch: Any) -> list[Any]:
    """The tensors of a batch that may take a gradient; those of a Window must not.

    Raises:
        ValueError: rows take a gradient where it could not be given back.
    """
    if not isinstance(batch, Window):
        return tensors_of(batch)
    leaves = [leaf for microbatch in batch for leaf in tensors_of(microbatch)]
    for leaf in leaves:
        if takes_gradient(leaf.dtype) and is_recorded(leaf):
            raise ValueError(
                "Rows of a Window take no gradient. Got an array of shape "
                f"{leaf.shape}, which a tape records. Pass a batch and a microbatch_size."
            )
    return []


def _refuse_tangents(tensors: Sequence[Any]) -> None:
    if has_tangent(tensors):
        raise ValueError(
            "A rowwise function has derivatives by tf.GradientTape. "
            "Got a call inside tf.autodiff.ForwardAccumulator. Nest two tapes instead."
        )
