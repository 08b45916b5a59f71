"""Decides whether a second pass may run in smaller micro-batches when memory runs out."""

from collections.abc import Callable, Sequence

from virtualbatch.torch._microbatch import Microbatch, most_rows
from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._rowwise.replay import Replay


def refuses_another_cut(
    replay: Replay, cut: Sequence[Microbatch]
) -> Callable[[BaseException], bool]:
    """A function that refuses smaller micro-batches in the second pass than in the first pass.

    Smaller micro-batches are refused if they would draw other random numbers, or see other
    statistics, than the outputs of the first pass.

    Args:
        replay: the state at the start of the first pass, and what the pass changed.
        cut: the micro-batches of the first pass.

    Returns:
        error -> whether smaller micro-batches are refused. If the error is certainly an
        out-of-memory error, the function raises a MemoryError instead of returning True.
    """

    def refuse(error: BaseException) -> bool:
        if replay.is_free:
            return False
        smaller = max(1, most_rows(cut) // 2)
        advice = f"Pass microbatch_size={smaller}."
        if ERRORS.is_certain(error):
            raise MemoryError(
                "The backward pass of a rowwise function must use the micro-batches of its "
                "forward pass, because random numbers or statistics belong to them. Got an "
                f"out-of-memory error with micro-batches of {most_rows(cut)} rows. {advice}"
            ) from error
        error.add_note(f"If memory ran out in the backward pass of a rowwise function: {advice}")
        return True

    return refuse
