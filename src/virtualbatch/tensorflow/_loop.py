"""Folding a step over the micro-batches of a window: the one loop of this engine.

The step gives sums, which are combined over the window, and rows, which are concatenated. In a
graph the step is traced once per micro-batch shape, as a function of its own. Its first call gives
the first sums, and a while-loop adds the rest. So peak memory is that of one micro-batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.tensorflow._arrays import specs
from virtualbatch.tensorflow._replicas import replica, replicas, unless_empty
from virtualbatch.tensorflow._segment import Segment

_INDEX = tf.TensorSpec([], tf.int32)


class Output(NamedTuple):
    """What a step gives for one micro-batch.

    Fields:
        sums: nested structure of tensors and Nones, combined over the window.
        rows: list of tensors and Nones, concatenated along axis 0 over the window.
    """

    sums: Any
    rows: Sequence[Any]


class Traced(NamedTuple):
    """A segment with its step, ready to be called.

    Fields:
        segment: the micro-batches.
        offset: the number of micro-batches in the window before this segment.
        first: (number in the window, micro-batch) -> result of the step, for the first micro-batch
            of the segment.
        call: like `first`, for the other micro-batches of the segment.
        outputs: abstract result of the step in a graph; None eagerly.
    """

    segment: Segment
    offset: Any
    first: Callable[[Any, Any], Any]
    call: Callable[[Any, Any], Any]
    outputs: Any


def trace(
    segments: Sequence[Segment],
    step: Callable[..., Any],
    jit_compile: bool = False,
    extra: Sequence[Any] = (),
) -> list[Traced]:
    """Binds a step to each segment. In a graph the step is traced here, once per shape.

    Under a seed (`tf.random.set_seed`) every trace of a graph draws the same random numbers, and so
    does every place that calls one trace. Micro-batches and replicas would then share their dropout
    masks. So a step that draws is traced once per place, each time with a seed of its own.

    Args:
        segments: the window's segments.
        step: (number in the window, micro-batch) -> nested structure of tensors.
        jit_compile: whether XLA compiles the step. The loop around it stays a plain graph.
        extra: TensorSpecs of further arguments of the step. `bound` gives their values later.

    Returns:
        One Traced per segment, in order.
    """
    number_of_replica, count_of_replicas = replica(), replicas()

    def function(place: int) -> Any:
        seeded = _reseeded(step, place * count_of_replicas + number_of_replica)
        return tf.function(seeded, autograph=False, jit_compile=jit_compile or None)

    shared = function(0)
    result: list[Traced] = []
    offset: Any = 0
    for number, segment in enumerate(segments):
        if tf.executing_eagerly():
            result.append(Traced(segment, offset, step, step, None))
        else:
            spec = specs(segment.get(tf.constant(0)))
            first = rest = shared.get_concrete_function(_INDEX, spec, *extra)
            if _draws_from_a_seed(first):
                if number > 0:
                    first = function(2 * number).get_concrete_function(_INDEX, spec, *extra)
                if not _is_one(segment.count):
                    rest = function(2 * number + 1).get_concrete_function(_INDEX, spec, *extra)
            result.append(Traced(segment, offset, first, rest, first.structured_outputs))
        offset = offset + segment.count
    return result


def bound(traced: Traced, *extra: Any) -> Traced:
    """The same segment, with the further arguments of its step bound."""
    return traced._replace(
        first=lambda index, batch: traced.first(index, batch, *extra),
        call=lambda index, batch: traced.call(index, batch, *extra),
    )


def fold(
    traced: Sequence[Traced],
    route: Callable[[Any, Any], Output],
    combine: Callable[[Any, Any], Any],
) -> Output:
    """Runs a window.

    Args:
        traced: segments with their steps.
        route: (number in the window, result of the step) -> Output; runs inside the loop.
        combine: (sums so far, sums of one micro-batch) -> sums, of the same structure.

    Returns:
        The window's sums, and for each entry of `rows` the concatenation over the window; None for
        an entry that is None in every micro-batch.
    """
    sums: Any = None
    pieces: list[list[Any]] = []
    for segment, offset, call_first, call, outputs in traced:
        # No forward pass needs the earlier sums. But two forward passes at once would hold two sets
        # of activations, so this one waits.
        if sums is not None:
            segment = _waiting(segment, sums)
        index, microbatch = _scalar(offset), segment.get(_scalar(0))
        # A step may change state without reading a row. Refused rows must stop it all the same.
        # Only a control edge does that, because only the readers of an input wait for it.
        with tf.control_dependencies(_ready(microbatch)):
            run = partial(call_first, index, microbatch)
            entries = segment.entries
            found = run() if entries is None else unless_empty(entries, run, outputs)
        first = route(index, found)
        sums = first.sums if sums is None else combine(sums, first.sums)
        given: list[Sequence[Any]] = [first.rows]
        if not _is_one(segment.count):
            sums, given = _loop(segment, offset, call, route, combine, sums, first.rows)
        pieces = pieces or [[] for _ in first.rows]
        for kept, *new in zip(pieces, *given, strict=True):
            kept.extend(piece for piece in new if piece is not None)
    return Output(sums, [_concatenated(kept) for kept in pieces])


def _is_one(count: Any) -> bool:
    """Whether a segment is known to have only one micro-batch."""
    return isinstance(count, int) and count == 1


def _reseeded(step: Callable[..., Any], place: int) -> Callable[..., Any]:
    """The step, with a seed of its own for each place that calls it."""

    def seeded(*args: Any) -> Any:
        graph = tf.compat.v1.get_default_graph()
        if graph.seed is not None:
            graph.seed += place
        # A copy of the structure, which the step may change. TensorFlow refuses a step that changes
        # the dicts and lists of its own arguments.
        return step(*tf.nest.map_structure(lambda leaf: leaf, args))

    return seeded


def _draws_from_a_seed(traced: Any) -> bool:
    """Whether a traced step holds an operation whose random numbers follow from a seed."""
    if traced.graph.seed is None:
        return False
    found = traced.graph.as_graph_def()
    nodes = [*found.node, *(node for f in found.library.function for node in f.node_def)]
    return any("seed2" in node.attr for node in nodes)


def _scalar(number: Any) -> Any:
    # A Python number would be a new signature of the step at every micro-batch.
    return number if tf.executing_eagerly() else tf.convert_to_tensor(number, tf.int32)


def _waiting(segment: Segment, sums: Any) -> Segment:
    return segment if tf.executing_eagerly() else segment.after(_ready(sums))


def _ready(*structures: Any) -> list[Any]:
    """An operation of the graph that runs once the structures can be read."""
    if tf.executing_eagerly():
        return []
    leaves = tf.nest.flatten(structures, expand_composites=True)
    # A control edge to an inlined function waits only for its side effects. Only a reader of its
    # results waits for the results.
    return [tf.group([tf.identity(leaf) for leaf in leaves if tf.is_tensor(leaf)])]


def _concatenated(pieces: list[Any]) -> Any:
    if not pieces:
        return None
    return pieces[0] if len(pieces) == 1 else tf.concat(pieces, 0)


def _loop(
    segment: Segment,
    offset: Any,
    call: Callable[[Any, Any], Any],
    route: Callable[[Any, Any], Output],
    combine: Callable[[Any, Any], Any],
    sums: Any,
    first_rows: Sequence[Any],
) -> tuple[Any, list[Sequence[Any]]]:
    """The micro-batches of a segment after its first, in a while-loop."""
    present = [piece is not None for piece in first_rows]
    arrays = [
        tf.TensorArray(
            piece.dtype,
            size=segment.count,
            infer_shape=False,
            element_shape=tf.TensorShape([None]).concatenate(piece.shape[1:]),
        ).write(0, piece)
        for piece in first_rows
        if piece is not None
    ]

    def body(i: Any, carry: list[Any], arrays: list[Any]) -> tuple[Any, list[Any], list[Any]]:
        output = route(offset + i, call(offset + i, segment.get(i)))
        pieces = [piece for piece in output.rows if piece is not None]
        written = [array.write(i, piece) for array, piece in zip(arrays, pieces, strict=True)]
        return i + 1, _dense(combine(_packed(sums, carry), output.sums)), written

    # One iteration at a time, and the first one after the sums before the loop. The rows wait, not
    # the start of the loop: TensorFlow folds a constant start and drops its control edges.
    segment = _waiting(segment, sums)
    _, carry, arrays = tf.while_loop(
        lambda i, *_: i < segment.count,
        body,
        (tf.constant(1), _dense(sums), arrays),
        parallel_iterations=1,
    )
    found = iter(arrays)
    return _packed(sums, carry), [[next(found).concat() if there else None for there in present]]


def _dense(structure: Any) -> list[Any]:
    """The tensors of a structure without its Nones, which a loop cannot carry."""
    return [leaf for leaf in tf.nest.flatten(structure) if leaf is not None]


def _packed(structure: Any, tensors: Sequence[Any]) -> Any:
    """The structure again, with its tensors replaced by `tensors`."""
    values = iter(tensors)
    flat = [None if leaf is None else next(values) for leaf in tf.nest.flatten(structure)]
    return tf.nest.pack_sequence_as(structure, flat)
