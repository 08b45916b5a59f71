"""The first pass: the outputs of all rows, a micro-batch at a time. No graph stays."""

from collections.abc import Sequence
from contextlib import ExitStack

from virtualbatch.torch._microbatch import Microbatch, known_rows
from virtualbatch.torch._rowwise.graph import Graphs
from virtualbatch.torch._rowwise.inputs import Inputs
from virtualbatch.torch._rowwise.one_update import one_update
from virtualbatch.torch._rowwise.outputs import Outputs
from virtualbatch.torch._rowwise.replay import Replay


def first_pass(inputs: Inputs, cut: Sequence[Microbatch], replay: Replay) -> Outputs:
    """Runs fn on each micro-batch.

    Where gradients are recorded they are recorded here as well, though nothing is differentiated:
    without them some layers compute something else.

    Args:
        inputs: of the call.
        cut: the micro-batches.
        replay: where this begins.

    Raises:
        ValueError: an output has not one entry per row, or the graph holds what it must not.
        TypeError: an output is no tensor.
    """
    outputs = Outputs(sum(map(known_rows, cut)))
    graphs = Graphs(inputs.found.parameters)
    with ExitStack() as stack:
        forward = one_update(stack, inputs.found.with_buffers, replay.before)
        for microbatch in cut:
            replay.begin()
            with forward():
                called = inputs.call(microbatch)
            outputs.add(called.outputs, called.build, known_rows(microbatch))
            own = [*called.shared, *called.rows.values()]
            graphs.look([leaf for _, leaf in called.outputs], own)
            # Two graphs at once would hold two sets of activations.
            del called, own
    replay.end()
    return outputs
