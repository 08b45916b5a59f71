"""Running a window again in smaller pieces, where memory ran out."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from virtualbatch.plan.auto import CurrentSize
from virtualbatch.plan.out_of_memory import MemoryErrors, free_frames, no_smaller_size

_log = logging.getLogger("virtualbatch")

Cut = TypeVar("Cut")
Result = TypeVar("Result")


class Memory(NamedTuple):
    """What an engine knows of memory.

    Fields:
        errors: by which its framework says that memory ran out.
        left_bytes: () -> what is left; None if the device does not tell.
    """

    errors: MemoryErrors
    left_bytes: Callable[[], int | None]


def run_as_it_is(run: Callable[[], Result], memory: Memory) -> Result:
    """Runs a window whose micro-batches cannot be cut; says so where memory runs out.

    Args:
        run: runs the window once, and waits for it.
        memory: what the engine knows of memory.
    """
    try:
        return run()
    except memory.errors.kinds as error:
        if memory.errors.is_possible(error):
            error.add_note(
                "If memory ran out: the rows of this Window cannot be told, so its micro-batches "
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
    """Runs a window, again with smaller micro-batches as long as memory runs out.

    Some errors only may mean that. They are tried with smaller micro-batches too; if they still
    come with one row, memory was not the reason, and the first of them is raised unchanged. A
    `MemoryError` that was raised by hand is tried once more; if another comes, it is raised so.

    Args:
        run: runs the window once, cut like this, and waits for it.
        cut: the micro-batches of the first attempt.
        rows: cut -> rows of its largest micro-batch.
        smaller: rows -> a cut whose micro-batches have no more.
        size: the size in force; the smaller one is kept in it.
        memory: what the engine knows of memory.
        largest: () -> names and bytes of the largest parameters, largest first.
        put_back: undoes whatever a failed attempt wrote.
        is_too_late: error -> whether more had been written by then than can be undone.
        unit: what sizes count; "tokens" where rows are packed.

    Raises:
        MemoryError: not even a micro-batch of one row fits; or the user's own, unchanged.
    """
    # What to go on with where memory is not the reason.
    known = size.rows
    first: BaseException | None = None
    by_hand: BaseException | None = None
    ran_out = False
    # Rows of a cut that is still to be made: that may run out of memory as well.
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
        # Its frames hold the tensors of the window.
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
