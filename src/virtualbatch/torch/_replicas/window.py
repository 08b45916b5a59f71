"""One window of several ranks.

Ranks add up their weights, run their micro-batches apart, agree that all have succeeded, and add
up their gradients once. Ranks whose modules gather parameters run in step instead: see `in_step`.
"""

from collections.abc import Callable, Sequence

import torch

from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._batchnorm import is_tracked
from virtualbatch.torch._conclusion import Conclusion, Ran, held_by
from virtualbatch.torch._coupled import refused_if_coupled
from virtualbatch.torch._fit import Fit
from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._replicas.agreement import Agreement
from virtualbatch.torch._replicas.in_step import run_in_step
from virtualbatch.torch._replicas.replicas import Outcome, Prove, Replicas
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._window import Program


def run_window(
    replicas: Replicas,
    program: Program,
    read: Callable[[], ReadBatch],
    fit: Callable[[ReadBatch], Fit],
    prove: Prove,
) -> tuple[Ran, Outcome]:
    """Runs the micro-batches of this rank.

    Args:
        replicas: the ranks.
        program: the loss, its weight and its modules.
        read: reads the batch of this rank.
        fit: batch -> how it is cut.
        prove: tries the law on a first window.

    Returns:
        The window as it ran on this rank, with gradients that are not added up yet; and the results
        that all ranks know.

    Raises:
        RuntimeError: another rank has failed. Everything is as before.
    """
    found = program.found
    channels = [layer.running_mean.numel() for layer in found.with_buffers if is_tracked(layer)]
    device = found.accelerator or torch.device("cpu")
    replicas.settle()
    run = _run_apart if replicas.can_run_alone else run_in_step
    with Agreement(
        replicas.group, device, len(found.parameters), channels, not replicas.can_run_alone
    ) as agreement:
        with replicas.quiet():
            replicas.check(program)
            batch = read()
            fitting = fit(batch)
        with Undo() as undo:
            ran = run(replicas, agreement, program, batch, fitting, prove, held_by(undo))
            outcome = agreement.after(ran)
            undo.instead(None)
    return ran, outcome


def _run_apart(
    replicas: Replicas,
    agreement: Agreement,
    program: Program,
    batch: ReadBatch,
    fit: Fit,
    prove: Prove,
    hold: Conclusion,
) -> Ran:
    """Runs this rank's micro-batches, and again with smaller ones if memory runs out."""
    with replicas.quiet():
        weights = program.weights(fit.cut)
    totals = agreement.before(weights)

    def checked(ran: Ran) -> Ran:
        # The last check that can fail on one rank only.
        if ran.loop.gradients is not None:
            ran.loop.gradients.check_leaves()
        held: Ran = hold(ran)
        return held

    def run(cut: Sequence[Microbatch]) -> Ran:
        shares = program.weights(cut).shares(totals)
        ran: Ran = program.run(prove(batch, cut, shares), shares, checked)
        return ran

    with replicas.quiet(), refused_if_coupled() as refuse:
        found: Ran = fit.run(run, refuse=refuse)
    return found
