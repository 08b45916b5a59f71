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

    If the caller records gradients, this pass records them too, although it differentiates nothing:
    some layers compute something else without recording.

    Args:
        inputs: the inputs of the call.
        cut: the micro-batches.
        replay: the state at the start of the pass.

    Raises:
        ValueError: an output has not one entry per row, or its graph reaches outside of fn.
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
            # Freed before the next forward pass: two graphs would hold two sets of activations.
            del called, own
    replay.end()
    return outputs
