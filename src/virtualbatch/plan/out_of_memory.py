"""Recognises out-of-memory errors of all frameworks, and describes them in words."""

import math
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from virtualbatch.plan.plan import readable_bytes

# How allocators write the size of a request; the first pattern that matches counts.
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


# Python's own error has no text. These are the texts of C++ and NumPy.
_OF_PYTHON = ("std::bad_alloc", "Unable to allocate")


class MemoryErrors(NamedTuple):
    """The errors of one framework that mean, or may mean, that memory ran out.

    For Python's `MemoryError` the text decides: an allocator leaves it empty or uses a known
    wording. Any other text comes from user code that raised the error by hand.

    Fields:
        classes: errors that always mean it.
        kinds: errors whose text decides; `classes` and `MemoryError` are among them.
        certain: texts that only a failed allocation has.
        ambiguous: texts that a failed allocation has, and other errors have too.
    """

    classes: tuple[type[BaseException], ...]
    kinds: tuple[type[BaseException], ...]
    certain: re.Pattern[str]
    ambiguous: re.Pattern[str]

    def is_certain(self, error: BaseException) -> bool:
        """Whether an error's class or text means that an allocation failed."""
        if isinstance(error, self.classes):
            return True
        text = str(error)
        if isinstance(error, MemoryError) and _is_of_python(text):
            return True
        return isinstance(error, self.kinds) and bool(self.certain.search(text))

    def is_by_hand(self, error: BaseException) -> bool:
        """Whether user code raised it: a `MemoryError` with a text that no allocator writes."""
        return isinstance(error, MemoryError) and not self.is_certain(error)

    def is_possible(self, error: BaseException) -> bool:
        """Whether an error means, or may mean, that an allocation failed."""
        if self.is_certain(error):
            return True
        return isinstance(error, self.kinds) and bool(self.ambiguous.search(str(error)))


def _is_of_python(text: str) -> bool:
    return not text or any(known in text for known in _OF_PYTHON) or bytes_asked(text) is not None


def any_of(*texts: str) -> re.Pattern[str]:
    """A pattern that matches any of these texts literally."""
    return re.compile("|".join(map(re.escape, texts)))


def bytes_asked(text: str) -> int | None:
    """The bytes that an allocation asked for, read from the error; None if it does not say.

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
    """Frees what the frames of an error hold: the tensors of a window that runs again.

    Args:
        error: the error that ended an attempt. The frames of its causes and contexts are freed too,
            except for the error that the caller is handling.
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
        left_bytes: bytes that the device or the container has left; None if unknown.
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
