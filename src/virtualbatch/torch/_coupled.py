"""Windows whose loss calls a rowwise function, and so sees all rows: they are not cut smaller.

With fewer rows such a loss has another value, and no error would show that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._undo import Undo

# Rows per micro-batch of the rowwise functions in the running window; None outside a window.
_SIZES: ContextVar[list[int] | None] = ContextVar("rowwise sizes of a window", default=None)


def tell(rows: int) -> None:
    """Registers a rowwise function with the running window, if there is one.

    Args:
        rows: the rows of the function's largest micro-batch.
    """
    sizes = _SIZES.get()
    if sizes is not None:
        sizes.append(rows)


@contextmanager
def refused_if_coupled() -> Iterator[Callable[[BaseException], bool]]:
    """Collects rowwise functions that run inside the context.

    Yields:
        A function of an error that refuses to cut the window smaller. It returns False if no
        rowwise function ran. Otherwise it raises a MemoryError, or returns True: the given error
        must be raised.
    """
    sizes: list[int] = []

    def refuse(error: BaseException) -> bool:
        if not sizes:
            return False
        if isinstance(error, MemoryError) and error.__cause__ is not None:
            # The error comes from a rowwise function and already says what to do.
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
