"""What could not be run, in one line and with exit code 2."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from virtualbatch.certify.users_line import OURS, Line, folder, is_in, users_line
from virtualbatch.demo.parent import ChildFailure

# Classes that carry a message of ours where a line of ours raises them.
_SAID = (ValueError, TypeError, MemoryError, ModuleNotFoundError)
_INTERRUPTED = 130


@contextmanager
def one_line() -> Iterator[None]:
    """Whatever is raised inside becomes one line of an error and exit code 2.

    Python's own exit code for an error is 1, which here says that something is not exact.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except BaseException as error:
        print(f"Error: {error if is_said(error) else in_words(error)}", file=sys.stderr)
        raise typer.Exit(2) from None


def say(text: object) -> None:
    """Prints a text, and raises at once where nobody takes it."""
    try:
        print(text, flush=True)
    except (OSError, UnicodeError):
        # Python would try again at its end, and exit with a code of its own.
        sys.stdout = None
        raise


def is_said(error: BaseException) -> bool:
    """Whether a line of this package raised it, with a message for the user."""
    if isinstance(error, ChildFailure):
        return True
    lines = _lines(error)
    return isinstance(error, _SAID) and bool(lines) and is_in(lines[0].file, [OURS])


def in_words(error: BaseException) -> str:
    """An error on one line: its class, its text and the user's line that it comes from."""
    text = " ".join(_text(error).split())
    lines = _lines(error)
    place = users_line(lines, [OURS, folder(os.__file__)])
    if not place and lines:
        place = f"{os.path.basename(lines[0].file)}:{lines[0].number}"
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{found} at {place}" if place else found


def _lines(error: BaseException) -> list[Line]:
    """The lines that an error came through, where it was raised first."""
    frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    return [
        Line(frame.f_code.co_filename, number, frame.f_code.co_qualname) for frame, number in frames
    ]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    # Whatever a class of the user's does there.
    except Exception as failed:
        return f"(its text cannot be read: {type(failed).__name__})"
