"""What a function's graph shows: the variables that it reaches, and what cannot run twice."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

# The part of TensorFlow that orders operations. No public name tells which ones only read.
from tensorflow.python.framework import auto_control_deps_utils

from virtualbatch.tensorflow._rowwise.recording import is_recorded, is_recording


class Reached(NamedTuple):
    """The variables that a function reaches.

    Fields:
        variables: all variables.
        written: the variables that the function writes to.
    """

    variables: list[Any]
    written: list[Any]

    @property
    def trained(self) -> list[Any]:
        """The variables that take a gradient now. The user may freeze and unfreeze layers."""
        return [v for v in self.variables if v.trainable]

    @property
    def watched(self) -> list[Any]:
        """The variables that are not trainable, but that a tape was told to watch."""
        return [
            v
            for v in self.variables
            if not v.trainable and v.dtype.is_floating and is_recorded(v.handle)
        ]

    @property
    def changing(self) -> list[Any]:
        """The variables that some call may change, even if this graph does not.

        What a layer writes depends on whether it is frozen, and whether it runs in training mode.
        """
        written = set(map(id, self.written))
        return [v for v in self.variables if not v.trainable or id(v) in written]


def traced_alone(
    fn: Callable[..., Any], microbatch: Any, tensors: Sequence[Any]
) -> tuple[Any, Any]:
    """A function's graph for a micro-batch, made outside the program that runs the function.

    Args:
        fn: (micro-batch, tensors) -> outputs.
        microbatch: nested structure of specs and of leaves without rows.
        tensors: specs of the other tensors that the function gets.

    Returns:
        The graph, and the outputs in it.
    """
    autograph = tf.__internal__.autograph
    found = []

    # Leaves are passed, not the structure: TensorFlow does not take every structure as an argument,
    # and refuses a function that changes its argument.
    @tf.function
    def traced(leaves: Any, tensors: Any) -> None:
        converted = autograph.tf_convert(fn, autograph.control_status_ctx())
        found.append(converted(tf.nest.pack_sequence_as(microbatch, leaves), tensors))

    try:
        graph = traced.get_concrete_function(tf.nest.flatten(microbatch), list(tensors)).graph
    except Exception as error:
        error.add_note(
            "rowwise traces fn with tf.function once, to learn which variables it reads and writes."
        )
        raise
    return graph, found[-1]


def reached(graphs: Sequence[Any]) -> Reached:
    """The variables that the graphs of a function reach.

    Raises:
        ValueError: the function draws random numbers that cannot be drawn again, or uses a tensor
            that takes a gradient and was computed outside the function.
    """
    variables: dict[int, Any] = {}
    written: dict[int, Any] = {}
    for graph in graphs:
        _refuse_hidden_random(graph)
        _refuse_outside(graph)
        handles = {id(variable.handle): variable for variable in graph.variables}
        variables |= handles
        only_read = set(auto_control_deps_utils.get_read_only_resource_input_indices_graph(graph))
        places = {id(x): k for k, x in enumerate(graph.inputs)}
        for outer, inner in graph.captures:
            if id(outer) in handles and places[id(inner)] not in only_read:
                written[id(outer)] = handles[id(outer)]
    return Reached(list(variables.values()), list(written.values()))


def hidden_random(graph: Any) -> list[str]:
    """Names of operations that draw random numbers from an internal state of TensorFlow."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    # Such operations have a seed as an attribute. Others draw from a variable or a given seed.
    return sorted({node.op for node in nodes if "seed2" in node.attr})


def _refuse_hidden_random(graph: Any) -> None:
    hidden = hidden_random(graph)
    if hidden:
        raise ValueError(
            "fn must draw random numbers that can be drawn again. "
            f"Got the operations {', '.join(hidden)}, whose state TensorFlow keeps for itself. "
            "Use Keras layers, tf.random.Generator or tf.random.stateless_* instead."
        )


def _refuse_outside(graph: Any) -> None:
    for outer, _ in graph.captures:
        if outer.dtype.is_floating and _may_take_gradient(outer):
            raise ValueError(
                "fn must not use a tensor that was computed outside of it with a gradient. "
                f"Got one of shape {outer.shape} in its closure. "
                "Pass it as an argument: encode(batch, tensor)."
            )


def _may_take_gradient(tensor: Any) -> bool:
    if is_recorded(tensor):
        return True
    if tf.is_symbolic_tensor(tensor) and not is_recording():
        # A tape outside the graph may ask for gradients through the graph.
        return any(op.type in ("Placeholder", "ReadVariableOp") for op in _before(tensor.op))
    return False


def _before(op: Any) -> Iterator[Any]:
    seen, waiting = set(), [op]
    while waiting:
        latest = waiting.pop()
        if latest.name not in seen:
            seen.add(latest.name)
            yield latest
            if latest.type != "StopGradient":
                waiting += [x.op for x in latest.inputs if x.dtype.is_floating]
