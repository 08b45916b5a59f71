"""Certifying a TensorFlow training step, and leaving its variables as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.diagnosis import certified
from virtualbatch.certify.step import check_microbatches, refuse_window
from virtualbatch.tensorflow._arrays import as_tensors
from virtualbatch.tensorflow._batch import segments
from virtualbatch.tensorflow._certify.step import TensorFlowTrainingStep
from virtualbatch.tensorflow._window import Program


def certificate(
    program: Program, batch: Any, microbatch_size: int | None, accumulation_steps: int | None
) -> Certificate:
    """The certificate of a program; see `virtualbatch.tensorflow.certify`."""
    _check_cut(batch, microbatch_size, accumulation_steps)
    others = other_variables(program, batch)
    before = [(variable, variable.numpy()) for variable in others]
    with run_eagerly():
        try:
            # Made inside the try, because its constructor already runs the loss.
            return certified(
                TensorFlowTrainingStep(program, batch, microbatch_size, accumulation_steps, others)
            )
        finally:
            for variable, value in before:
                variable.assign(value)


def other_variables(program: Program, batch: Any) -> list[Any]:
    """The variables that a loss reaches and that are not differentiated."""

    # A graph knows all variables that a function reaches.
    def run(tensors: Any) -> None:
        # The result is dropped: a graph may not be able to return it, and that is refused later.
        # The structure is copied: the loss may change dicts and lists, but TensorFlow refuses
        # changes of a function's own arguments.
        program.loss_fn(tf.nest.map_structure(lambda leaf: leaf, tensors))

    graph = tf.function(run).get_concrete_function(as_tensors(batch)).graph
    differentiated = {_handle(variable) for variable in tf.nest.flatten(program.variables)}
    return [v for v in graph.variables if _handle(v) not in differentiated]


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Inside the context, every `tf.function` runs eagerly."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _handle(variable: Any) -> int:
    """The identity of a variable. Variables of Keras wrap those of TensorFlow."""
    inner = getattr(variable, "_value", variable)
    return id(getattr(inner, "handle", inner))


def _check_cut(batch: Any, microbatch_size: int | None, accumulation_steps: int | None) -> None:
    refuse_window(batch, microbatch_size)
    if not tf.executing_eagerly():
        raise ValueError("certify reads values. Got a call inside tf.function. Call it outside.")
    cut = segments(batch, microbatch_size, accumulation_steps)
    check_microbatches([int(segment.rows(0)) for segment in cut])
