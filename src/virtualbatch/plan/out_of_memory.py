"""What can be said when memory runs out, whatever the framework."""

import math
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from virtualbatch.plan.plan import readable_bytes

# How allocators say what they were asked for; the first pattern that is found counts.
_ASKED = (
    re.compile(r"[Tt]ried to allocate (?P<number>[\d.]+) ?(?P<unit>[KMGT]?i?[Bb](?:ytes)?)"),
    re.compile(
        r"allocat\w* (?:request for )?(?P<number>\d+(?:\.\d+)?) ?"
        r"(?P<unit>[KMGT]?i?[Bb](?:ytes)?|[KMGT]\b)"
    ),
)
# TensorFlow names a shape and a type instead.
_SHAPE = re.compile(r"shape\[(?P<shape>\d+(?:,\d+)*)\] and type (?P<type>\w+)")
_BYTES = {"bool": 1, "half": 2, "bfloat16": 2, "float": 4, "double": 8, "complex64": 8}
_BYTES |= {f"{sign}int{8 * size}": size for sign in ("", "u") for size in (1, 2, 4, 8)}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


# Python itself says nothing; C++ and NumPy say this.
_OF_PYTHON = ("std::bad_alloc", "Unable to allocate")


class MemoryErrors(NamedTuple):
    """The errors by which one framework says that memory ran out, or that it may have.

    Python's `MemoryError` is read by its text: an allocator says nothing or what allocators say,
    while whoever raises one by hand says what he means by it.

    Fields:
        classes: errors that always say so.
        kinds: errors whose text is read; `classes` and `MemoryError` are among them.
        certain: texts that only a failed allocation has.
        ambiguous: texts that a failed allocation has, and other faults have too.
    """

    classes: tuple[type[BaseException], ...]
    kinds: tuple[type[BaseException], ...]
    certain: re.Pattern[str]
    ambiguous: re.Pattern[str]

    def is_certain(self, error: BaseException) -> bool:
        """Whether an error says that an allocation failed; by its class, else by its text."""
        if isinstance(error, self.classes):
            return True
        text = str(error)
        if isinstance(error, MemoryError) and _is_of_python(text):
            return True
        return isinstance(error, self.kinds) and bool(self.certain.search(text))

    def is_by_hand(self, error: BaseException) -> bool:
        """Whether it is a `MemoryError` with a text that no allocator writes."""
        return isinstance(error, MemoryError) and not self.is_certain(error)

    def is_possible(self, error: BaseException) -> bool:
        """Whether an error says that an allocation failed, or may have failed, not by hand."""
        if self.is_certain(error):
            return True
        return isinstance(error, self.kinds) and bool(self.ambiguous.search(str(error)))


def _is_of_python(text: str) -> bool:
    return not text or any(known in text for known in _OF_PYTHON) or bytes_asked(text) is not None


def any_of(*texts: str) -> re.Pattern[str]:
    """A pattern that finds any of some texts, word for word."""
    return re.compile("|".join(map(re.escape, texts)))


def bytes_asked(text: str) -> int | None:
    """The bytes that an allocator could not give, by the text of its error.

    Args:
        text: text of an out-of-memory error.
    """
    for pattern in _ASKED:
        if found := pattern.search(text):
            prefix = found["unit"][0] if found["unit"][0] in "KMGT" else ""
            return int(float(found["number"]) * _UNITS[prefix])
    if (found := _SHAPE.search(text)) and found["type"] in _BYTES:
        return math.prod(map(int, found["shape"].split(","))) * _BYTES[found["type"]]
    return None


def free_frames(error: BaseException) -> None:
    """Frees what the frames of an error hold: the tensors of a window that is to run again.

    Args:
        error: what ended an attempt. The errors that it was raised from, or while another was
            handled, hold frames too; one that the caller is handling is the caller's.
    """
    seen = [sys.exception()]
    found = [error]
    while found:
        latest = found.pop()
        traceback.clear_frames(latest.__traceback__)
        seen.append(latest)
        for earlier in (latest.__cause__, latest.__context__):
            if earlier is not None and not any(earlier is other for other in seen):
                found.append(earlier)


def no_smaller_size(
    error: BaseException, left_bytes: int | None, largest: Sequence[tuple[str, int]]
) -> MemoryError:
    """The error for a micro-batch of one row that does not fit.

    Args:
        error: what the framework raised.
        left_bytes: what the device or the container has left, if that is known.
        largest: names and bytes of the largest parameters, largest first.
    """
    asked = bytes_asked(str(error))
    got = "memory ran out" if asked is None else f"{readable_bytes(asked)} more were asked for"
    if left_bytes is not None:
        got += f" with {readable_bytes(left_bytes)} left"
    named = ", ".join(f"{name} ({readable_bytes(size)})" for name, size in largest)
    return MemoryError(
        f"A micro-batch of one row must fit in memory. Got one row, and {got}. Nothing of this "
        f"update was applied. The largest parameters are {named or 'none'}. Recompute activations "
        "instead of keeping them (checkpointing), train in bfloat16 or with an optimizer that "
        "keeps less state, or make the rows shorter or the device larger."
    )


def in_words(error: BaseException, errors: MemoryErrors) -> str:
    """An error in one line: that memory ran out, or its class and the first line of its text."""
    if errors.is_possible(error):
        return "memory ran out"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
