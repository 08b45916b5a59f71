"""Windows with a rowwise function inside, whose loss sees all rows: they are not cut smaller.

With fewer rows such a loss has another value, and no error would show it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._undo import Undo

# Rows of the micro-batches of rowwise functions in the window that runs; None outside of one.
_SIZES: ContextVar[list[int] | None] = ContextVar("rowwise sizes of a window", default=None)


def tell(rows: int) -> None:
    """Registers a rowwise function with the window that runs, if there is one.

    Args:
        rows: of its largest micro-batch.
    """
    sizes = _SIZES.get()
    if sizes is not None:
        sizes.append(rows)


@contextmanager
def refused_if_coupled() -> Iterator[Callable[[BaseException], bool]]:
    """Collects rowwise functions that run inside the context.

    Yields:
        What refuses to cut the window smaller if there were any: error -> False, or the error.
    """
    sizes: list[int] = []

    def refuse(error: BaseException) -> bool:
        if not sizes:
            return False
        if isinstance(error, MemoryError) and error.__cause__ is not None:
            # One of a rowwise function itself, which says what to do.
            return True
        advice = (
            "Pass its rowwise functions a smaller microbatch_size, such as "
            f"{max(1, max(sizes) // 2)}, or run rowwise on the loss as well."
        )
        if ERRORS.is_certain(error):
            raise MemoryError(
                "A window whose loss sees all rows, such as one of rowwise functions, cannot be "
                f"cut smaller when memory runs out. Got an out-of-memory error. {advice}"
            ) from error
        error.add_note(f"If memory ran out: this window cannot be cut smaller. {advice}")
        return True

    with Undo(partial(_SIZES.set, _SIZES.get())):
        _SIZES.set(sizes)
        yield refuse
