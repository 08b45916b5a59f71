"""Micro-batches that all ranks run at the same time, because a forward pass gathers parameters.

Ranks agree on a number of micro-batches, and each cuts its rows into as many. A rank with fewer
rows runs fillers: its first row, or a row of zeros. Fillers take part in all collectives, with
weight 0.
"""

from collections.abc import Sequence
from typing import Any

import torch

from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._fit import Fit
from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._replicas.agreement import Agreement
from virtualbatch.torch._replicas.replicas import Prove, Replicas
from virtualbatch.torch._window import Conclusion, Program, Ran


def run_in_step(
    replicas: Replicas,
    agreement: Agreement,
    program: Program,
    batch: ReadBatch,
    fit: Fit,
    prove: Prove,
    hold: Conclusion,
) -> Ran:
    """Runs as many micro-batches as the rank that wants most.

    Args:
        replicas: the ranks.
        agreement: theirs.
        program: what is run.
        batch: of this rank.
        fit: how it would be cut alone.
        prove: see `Prove`.
        hold: what becomes of the window.

    Raises:
        RuntimeError: another rank has failed before the first micro-batch.
        MemoryError: memory ran out. Other ranks may not have run out, so nothing runs again.
    """
    count = agreement.most(len(fit.cut))
    own = batch.cut_into(count) if fit.cut and not batch.is_window else fit.cut
    fillers = _fillers(batch, own, count - len(own))
    weights = program.weights(own)
    shares = weights.shares(agreement.before(weights))

    def step(done: int, of: int) -> None:
        if done == of:
            agreement.have_run()
        else:
            replicas.begin(is_filler=done >= len(own), is_last=done == of - 1)

    with replicas.quiet():
        try:
            cut = [*prove(batch, own, shares), *fillers]
            ran: Ran = program._replace(in_step=step).run(cut, shares, hold)
        except ERRORS.kinds as error:
            if ERRORS.is_possible(error) or ERRORS.is_by_hand(error):
                error.add_note(
                    "If memory ran out: ranks that gather parameters run in step, so this one "
                    "cannot cut its micro-batches smaller by itself. Pass a smaller "
                    "microbatch_size on all ranks."
                )
            raise
    return ran


def _fillers(batch: ReadBatch, own: Sequence[Microbatch], count: int) -> list[Microbatch]:
    """What a rank runs while others run more micro-batches than it has.

    Raises:
        ValueError: the shapes of its rows are not known.
    """
    if not count:
        return []
    # Whatever a loss function does to them in place, the next one is as before.
    return [_filler(batch, own).protected()] * count


def _filler(batch: ReadBatch, own: Sequence[Microbatch]) -> Microbatch:
    if own:
        return own[0] if own[0].rows is None else own[0].some([0])
    if batch.without_rows is None:
        raise ValueError(
            "A rank without rows runs in step with the others, on zeros in the shapes of its "
            "batch. Got an empty Window, which has no shapes. "
            "Pass a batch whose tensors have 0 rows, such as x[:0], on this rank."
        )
    return batch.without_rows.with_tensors(_row_of_zeros)


def _row_of_zeros(x: torch.Tensor) -> Any:
    return x.new_zeros((1, *x.shape[1:]))
