"""Runs a window again with smaller micro-batches when memory runs out."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from virtualbatch.plan.auto import CurrentSize
from virtualbatch.plan.out_of_memory import MemoryErrors, free_frames, no_smaller_size

_log = logging.getLogger("virtualbatch")

Cut = TypeVar("Cut")
Result = TypeVar("Result")


class Memory(NamedTuple):
    """An engine's view of memory.

    Fields:
        errors: the errors that its framework raises when memory runs out.
        left_bytes: () -> bytes that are left; None if the device does not report it.
    """

    errors: MemoryErrors
    left_bytes: Callable[[], int | None]


def run_as_it_is(run: Callable[[], Result], memory: Memory) -> Result:
    """Runs a window whose micro-batches cannot be cut; adds a note if memory runs out.

    Args:
        run: runs the window once, and waits for it.
        memory: the engine's view of memory.
    """
    try:
        return run()
    except memory.errors.kinds as error:
        if memory.errors.is_possible(error):
            error.add_note(
                "If memory ran out: the rows of this Window are unknown, so its micro-batches "
                "cannot be cut smaller. Make smaller ones."
            )
        raise


def run_until_it_fits(
    run: Callable[[Cut], Result],
    cut: Cut,
    rows: Callable[[Cut], int],
    smaller: Callable[[int], Cut],
    size: CurrentSize,
    memory: Memory,
    largest: Callable[[], Sequence[tuple[str, int]]],
    *,
    put_back: Callable[[], None] = lambda: None,
    is_too_late: Callable[[BaseException], bool] = lambda error: False,
    unit: str = "rows",
) -> Result:
    """Runs a window, and repeats it with smaller micro-batches as long as memory runs out.

    Some errors may, but need not, mean that memory ran out. The window is repeated after them too.
    If they still come with one row, memory was not the reason, and the first of them is raised
    unchanged. After a `MemoryError` from user code the window is repeated once. If user code raises
    a second one, the first is raised unchanged.

    Args:
        run: runs the window once with the given cut, and waits for it.
        cut: the micro-batches of the first attempt.
        rows: cut -> rows of its largest micro-batch.
        smaller: rows -> a cut whose micro-batches have at most that many rows.
        size: the size in use; a smaller one is kept in it.
        memory: the engine's view of memory.
        largest: () -> names and bytes of the largest parameters, largest first.
        put_back: undoes what a failed attempt wrote.
        is_too_late: error -> whether the attempt wrote something that cannot be undone.
        unit: what sizes count: "rows", or "tokens" for packed rows.

    Raises:
        MemoryError: not even a micro-batch of one row fits, or user code raised the error.
    """
    # The size to keep if memory is not the reason.
    known = size.rows
    first: BaseException | None = None
    by_hand: BaseException | None = None
    ran_out = False
    # Rows of the next cut. It is made inside `try`, because cutting may run out of memory too.
    wanted: int | None = None
    while True:
        try:
            if wanted is not None:
                cut, wanted = smaller(wanted), None
            return run(cut)
        except memory.errors.kinds as error:
            may_be = memory.errors.is_possible(error) or memory.errors.is_by_hand(error)
            if not may_be or is_too_late(error):
                raise
            failed = error
        put_back()
        # The error's frames hold the tensors of the window.
        free_frames(failed)
        first = first or failed
        is_by_hand = memory.errors.is_by_hand(failed)
        if is_by_hand and by_hand is not None:
            size.rows = known
            raise by_hand
        by_hand = by_hand or (failed if is_by_hand else None)
        is_certain = memory.errors.is_certain(failed)
        ran_out = ran_out or is_certain
        if not is_certain:
            _log.warning("This error may mean that memory ran out: %s", failed)
        if not size.shrink(rows(cut) if wanted is None else wanted, unit):
            if ran_out and not is_by_hand:
                raise no_smaller_size(failed, memory.left_bytes(), largest()) from failed
            size.rows = known
            raise failed if is_by_hand else first
        wanted = size.rows
        if is_certain:
            known = wanted
