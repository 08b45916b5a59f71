"""What the second pass does where memory runs out."""

from collections.abc import Callable, Sequence

from virtualbatch.plan.out_of_memory import MemoryErrors
from virtualbatch.torch._microbatch import Microbatch, most_rows
from virtualbatch.torch._rowwise.replay import Replay


def refuses_another_cut(
    replay: Replay, errors: MemoryErrors, cut: Sequence[Microbatch]
) -> Callable[[BaseException], bool]:
    """What refuses a second pass in smaller micro-batches than those of the first one.

    Args:
        replay: where the first pass began, and what it has moved.
        errors: by which PyTorch says that memory ran out.
        cut: the micro-batches of the first pass.

    Returns:
        error -> whether it is too late to cut them smaller.

    Raises:
        MemoryError: the function raises it where other micro-batches would be computed from other
            random numbers or statistics than the outputs that the loss has seen.
    """

    def refuse(error: BaseException) -> bool:
        if replay.is_free:
            return False
        smaller = max(1, most_rows(cut) // 2)
        advice = f"Pass microbatch_size={smaller}."
        if errors.is_certain(error):
            raise MemoryError(
                "The backward pass of a rowwise function must run the micro-batches of its forward "
                "pass, whose random numbers or statistics belong to them. Got one that ran out of "
                f"memory with micro-batches of {most_rows(cut)} rows. {advice}"
            ) from error
        error.add_note(f"If memory ran out in the backward pass of a rowwise function: {advice}")
        return True

    return refuse
