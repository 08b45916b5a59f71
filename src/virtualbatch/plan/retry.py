"""Running a window again in smaller pieces, where memory ran out."""

from collections.abc import Callable
from typing import NamedTuple


class Memory(NamedTuple):
    """What a backend knows of memory.

    Fields:
        kinds: classes of errors among which those of allocators are.
        is_out_of_memory: error -> whether it is one.
        left_bytes: () -> what is left; None if the device does not tell.
    """

    kinds: tuple[type[BaseException], ...]
    is_out_of_memory: Callable[[BaseException], bool]
    left_bytes: Callable[[], int | None]
