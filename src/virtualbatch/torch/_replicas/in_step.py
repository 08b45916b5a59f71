"""Micro-batches that all ranks run at the same time, because a forward pass gathers parameters.

Ranks agree on a number of micro-batches, and each rank cuts its rows into that many. A rank with
fewer rows also runs fillers: its first row, or a row of zeros. Fillers take part in all
collectives, with weight 0.
"""

from collections.abc import Sequence
from typing import Any

import torch

from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._conclusion import Conclusion, Ran
from virtualbatch.torch._fit import Fit
from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._replicas.agreement import Agreement
from virtualbatch.torch._replicas.replicas import Prove, Replicas
from virtualbatch.torch._window import Program


def run_in_step(
    replicas: Replicas,
    agreement: Agreement,
    program: Program,
    batch: ReadBatch,
    fit: Fit,
    prove: Prove,
    hold: Conclusion,
) -> Ran:
    """Runs a window, with as many micro-batches as the rank that needs most.

    Args:
        replicas: the ranks.
        agreement: the messages of the window.
        program: the loss, its weight and its modules.
        batch: the batch of this rank.
        fit: how this rank alone would cut the batch.
        prove: tries the law on a first window.
        hold: keeps the finished window open.

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
    """Micro-batches that a rank runs when other ranks have more micro-batches.

    Raises:
        ValueError: the shapes of the rank's rows are not known.
    """
    if not count:
        return []
    # Protected: a loss function may change one filler in place, but not the next one.
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
