"""Finds the line of the user's code that computed a value."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple


class Line(NamedTuple):
    """A line of code that is being executed.

    Fields:
        file: path of its file; `<...>` for code without a file.
        number: the line number.
        function: the qualified name of its function.
    """

    file: str
    number: int
    function: str


def folder(file: str) -> str:
    """The folder of a file, ending in a separator, so that it is a prefix of its files only."""
    return f"{Path(file).parent}{os.sep}"


# The folder of this package.
OURS = folder(str(Path(__file__).parent))


def users_line(lines: Iterable[Line], libraries: Sequence[str]) -> str:
    """The innermost line outside of some libraries, in words; empty if there is none.

    Args:
        lines: the innermost first.
        libraries: folders as `folder` returns them; lines inside them are skipped.
    """
    outside = (line for line in lines if not is_in(line.file, libraries))
    inner = next(outside, None)
    if inner is None:
        return ""
    text = f"{Path(inner.file).name}:{inner.number}"
    if "site-packages" not in inner.file:
        return text
    # Another library's own line says little without the one that called it.
    text = f"{inner.function.split('.')[0]} ({text})"
    user = next((line for line in outside if "site-packages" not in line.file), None)
    return f"{text}, {Path(user.file).name}:{user.number}" if user else text


def is_in(file: str, libraries: Sequence[str]) -> bool:
    """Whether a path is inside one of the libraries, or is not a file."""
    return file.startswith(("<", *libraries))


def frames() -> Iterator[FrameType]:
    """The frames of the call stack, the caller's first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def line_of(frame: FrameType) -> Line:
    """The current line of a frame."""
    code = frame.f_code
    return Line(code.co_filename, frame.f_lineno, code.co_qualname)


def is_ours(error: Exception) -> bool:
    """Whether this package raised the error itself, as a ValueError or TypeError."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    in_here = trace is not None and trace.tb_frame.f_code.co_filename.startswith(OURS)
    return in_here and isinstance(error, ValueError | TypeError)
