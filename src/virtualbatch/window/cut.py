"""How a batch is cut: checks of sizes, and rows of each micro-batch.

No array is touched here. Cuts are plain numbers.
"""

import numbers
from typing import Any


def check_sizes(microbatch_size: Any, accumulation_steps: Any) -> None:
    """Raises an error for size arguments that are wrong for every batch.

    Args:
        microbatch_size: rows of one forward and backward, or None.
        accumulation_steps: micro-batches per window, or None.

    Raises:
        ValueError: neither is given, or one is zero, negative, fractional or a boolean.
    """
    if microbatch_size is None and accumulation_steps is None:
        raise ValueError(
            "A batch needs a size to be cut by. Got neither microbatch_size nor "
            "accumulation_steps. Pass microbatch_size=, the number of rows that fit in memory "
            "at once."
        )
    if microbatch_size is not None and not _is_positive_integer(microbatch_size):
        raise ValueError(
            'microbatch_size must be a positive integer or "auto". '
            f"Got microbatch_size={microbatch_size!r}. "
            "Pass the number of rows that fit in memory at once."
        )
    if accumulation_steps is not None and not _is_positive_integer(accumulation_steps):
        raise ValueError(
            "accumulation_steps must be a positive integer. "
            f"Got accumulation_steps={accumulation_steps!r}. "
            "Pass the number of micro-batches per update."
        )


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0


def rows_per_microbatch(
    rows: Any, microbatch_size: int | None, accumulation_steps: int | None
) -> Any:
    """Rows of one micro-batch, from the size that was given.

    Args:
        rows: rows of the batch; a Python int, or a traced integer scalar. For a traced scalar only
            `+ - //` are used, and the engine itself must check that the two sizes agree.
        microbatch_size: checked rows of one micro-batch, or None.
        accumulation_steps: checked micro-batches per window, or None.

    Returns:
        microbatch_size if it is given, else ceil(rows / accumulation_steps).

    Raises:
        ValueError: both sizes are given and disagree for these rows.
    """
    if microbatch_size is None:
        if accumulation_steps is None:
            raise ValueError("internal: rows_per_microbatch needs one of the two sizes.")
        # A graph does not treat a NumPy integer as static.
        steps = int(accumulation_steps)
        return (rows + steps - 1) // steps
    if accumulation_steps is not None and isinstance(rows, int):
        count = -(-rows // microbatch_size)
        if count != accumulation_steps:
            raise ValueError(sizes_disagree(rows, microbatch_size, accumulation_steps))
    return int(microbatch_size)


def sizes_disagree(rows: int | str, microbatch_size: int, accumulation_steps: int) -> str:
    """The text of the error for two sizes that do not describe the same cut."""
    arithmetic = f"{rows} rows"
    if isinstance(rows, int):
        arithmetic = (
            f"{rows} rows / {microbatch_size} = {-(-rows // microbatch_size)} micro-batches"
        )
    return (
        "microbatch_size and accumulation_steps must describe the same cut. "
        f"Got microbatch_size={microbatch_size} and accumulation_steps={accumulation_steps} for "
        f"{arithmetic}. Pass only one of them."
    )


def even_cut(rows: int, microbatch_size: int) -> list[tuple[int, int]]:
    """Cuts rows contiguously into as few micro-batches as possible, of nearly equal size.

    Sizes differ by at most one row, so that a BatchNorm never gets a single leftover row.

    Args:
        rows: rows of the batch, >= 1.
        microbatch_size: rows that one micro-batch may hold, >= 1.

    Returns:
        (start, stop) of each micro-batch, in order, covering `range(rows)`.
    """
    return even_parts(rows, -(-rows // microbatch_size))


def even_parts(rows: int, count: int) -> list[tuple[int, int]]:
    """Cuts rows contiguously into `count` micro-batches of nearly equal size.

    Args:
        rows: rows of the batch.
        count: number of micro-batches, from 1 to `rows`.

    Returns:
        See `even_cut`.
    """
    size, extra = divmod(rows, count)
    stops = [(i + 1) * size + min(i + 1, extra) for i in range(count)]
    return list(zip([0, *stops[:-1]], stops, strict=True))
