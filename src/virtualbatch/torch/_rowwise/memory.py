"""What the second pass does where memory runs out."""

from collections.abc import Callable, Sequence

from virtualbatch.torch._microbatch import Microbatch, most_rows
from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._rowwise.replay import Replay


def refuses_another_cut(
    replay: Replay, cut: Sequence[Microbatch]
) -> Callable[[BaseException], bool]:
    """What refuses a second pass in smaller micro-batches than those of the first one.

    Args:
        replay: where the first pass began, and what it has moved.
        cut: the micro-batches of the first pass.

    Returns:
        error -> whether it is too late to cut them smaller.

    Raises:
        MemoryError: the function raises it where smaller micro-batches would draw other
            random numbers, or see other statistics, than the outputs that the loss has.
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
