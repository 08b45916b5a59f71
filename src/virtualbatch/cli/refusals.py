"""Turns errors of a command into one line and exit code 2."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from virtualbatch.certify.users_line import OURS, Line, folder, is_in, users_line
from virtualbatch.demo.parent import ChildFailure

# If this package raises an error of these classes, its text is a message for the user.
_SAID = (ValueError, TypeError, MemoryError, ModuleNotFoundError)
_INTERRUPTED = 130


@contextmanager
def one_line() -> Iterator[None]:
    """Prints any error raised inside as one line and exits with code 2.

    Python's own exit code for an error is 1, which here means that something is not exact.
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
    """Prints a text. Raises at once if the output is closed."""
    try:
        print(text, flush=True)
    except (OSError, UnicodeError):
        # Otherwise Python would flush again at exit, and end with another exit code.
        sys.stdout = None
        raise


def is_said(error: BaseException) -> bool:
    """Whether a line of this package raised it, with a message for the user."""
    if isinstance(error, ChildFailure):
        return True
    lines = _lines(error)
    return isinstance(error, _SAID) and bool(lines) and is_in(lines[0].file, [OURS])


def in_words(error: BaseException) -> str:
    """An error on one line: its class, its text and the line of the user's code."""
    text = " ".join(_text(error).split())
    lines = _lines(error)
    place = users_line(lines, [OURS, folder(os.__file__)])
    if not place and lines:
        place = f"{os.path.basename(lines[0].file)}:{lines[0].number}"
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{found} at {place}" if place else found


def _lines(error: BaseException) -> list[Line]:
    """The lines of an error's traceback, innermost first."""
    frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    return [
        Line(frame.f_code.co_filename, number, frame.f_code.co_qualname) for frame, number in frames
    ]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    # A user's class may raise anything here.
    except Exception as failed:
        return f"(its text cannot be read: {type(failed).__name__})"
