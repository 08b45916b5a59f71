"""One window of several ranks: weighed together, run apart, agreed upon, and added up once."""

from collections.abc import Callable, Sequence

import torch

from virtualbatch.torch._batch import Microbatch, ReadBatch
from virtualbatch.torch._batchnorm import is_tracked
from virtualbatch.torch._fit import Fit
from virtualbatch.torch._replicas.agreement import Agreement
from virtualbatch.torch._replicas.replicas import Outcome, Replicas
from virtualbatch.torch._window import Program, Ran
from virtualbatch.window.shares import Shares

# (micro-batches, their shares) -> those to run.
Prove = Callable[[ReadBatch, Sequence[Microbatch], Shares], Sequence[Microbatch]]


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
        program: what is run.
        read: reads the batch of this rank.
        fit: batch -> how it is cut.
        prove: tries the law on a first window.

    Returns:
        What has run here, whose gradients wait to be added up, and what all ranks know of it.

    Raises:
        RuntimeError: another rank has failed; everything is as it was.
    """
    found = program.found
    channels = [layer.running_mean.numel() for layer in found.with_buffers if is_tracked(layer)]
    device = found.accelerator or torch.device("cpu")
    replicas.gather()
    with Agreement(replicas.group, device, len(found.parameters), channels) as agreement:
        with replicas.quiet():
            batch = read()
            _refuse_kept_gradients(program)
            fitting = fit(batch)
            weights = program.weights(fitting.cut)
        totals = agreement.before(weights)

        def run(cut: Sequence[Microbatch]) -> Ran:
            shares = program.weights(cut).shares(totals)
            ran: Ran = program.run(prove(batch, cut, shares), shares, _checked)
            return ran

        with replicas.quiet():
            ran = fitting.run(run)
        try:
            outcome = agreement.after(ran)
        except BaseException:
            ran.put_back()
            raise
    ran.run.statistics.commit(outcome.statistics)
    return ran, outcome


def _checked(ran: Ran) -> Ran:
    """A window in which all has succeeded that can fail on one rank only."""
    if ran.run.gradients is not None:
        ran.run.gradients.check_leaves()
    return ran


def _refuse_kept_gradients(program: Program) -> None:
    """Refuses statistics of gradients that would be added to others before they are seen.

    Raises:
        ValueError: some `.grad` is neither empty nor zero.
    """
    grads = [parameter.grad for parameter in program.found.parameters]
    if program.stats and any(x is not None and bool(x.any()) for x in grads):
        raise ValueError(
            "Statistics over ranks are those of gradients that have met, so .grad must be empty. "
            "Got gradients of an earlier window in it. Call zero_grad() before."
        )
