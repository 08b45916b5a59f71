"""Checks the files that a command writes before its work, and writes them after it."""

import importlib.util
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from virtualbatch.atomic_write import check_writable, write_whole
from virtualbatch.report import require_tools

_EXAMPLES = {"--json": "result.json", "--html": "report.html", "--page": "benchmarks.md"}


def refuse_unwritable(
    json: Path | None,
    html: Path | None = None,
    page: Path | None = None,
    target: str | None = None,
) -> None:
    """Raises an error for a file that cannot be written, before minutes are spent on its content.

    Args:
        json: the file of `--json`.
        html: the file of `--html`.
        page: the file of `--page`.
        target: the user's program, whose file must not be overwritten.

    Raises:
        ValueError: a file cannot be written, or two options name the same file.
        ModuleNotFoundError: a package that makes pages is not installed.
    """
    given = (("--json", json), ("--html", html), ("--page", page))
    named = [(option, file) for option, file in given if file is not None]
    program = Path((target or "").rpartition(":")[0])
    for option, file in named:
        _refuse(option, file)
        if program.suffix == ".py" and _is_same(file, program):
            raise ValueError(
                f"{option} must name a file of its own. Got {option} {file}, the file of TARGET. "
                f"Pass for example {option} {_EXAMPLES[option]}"
            )
    for (option, file), (other, its_file) in combinations(named, 2):
        if _is_same(file, its_file):
            raise ValueError(
                f"{option} and {other} must name two files. Got {file} and {its_file}. "
                f"Pass for example {option} {_EXAMPLES[option]} {other} {_EXAMPLES[other]}"
            )
    if html is not None:
        require_tools()
    if page is not None and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            'Plots need matplotlib. Got none. Run: pip install "virtualbatch[report]"'
        )


def write(option: str, file: Path | None, content: Callable[[], str]) -> bool:
    """Writes a file if it was requested, and returns whether it was.

    Args:
        option: the option that named the file.
        file: the file; None if it was not requested.
        content: () -> the text to write.

    Raises:
        ValueError: the file cannot be written.
    """
    if file is None:
        return False
    text = content()
    try:
        write_whole(file, text)
    except OSError as error:
        raise unwritten(option, file, error) from error
    return True


def unwritten(option: str, file: Path, error: OSError) -> ValueError:
    """The error for a file that could not be written although the check passed.

    Args:
        option: the option that named the file.
        file: the path of the file.
        error: the error that was raised.
    """
    return ValueError(
        f"{option} must name a file that can be written. Got {option} {file} "
        f"({error.strerror or error}). Any file there is unchanged. Pass another name."
    )


def _refuse(option: str, file: Path) -> None:
    try:
        if file.is_dir():
            raise ValueError(
                f"{option} must name a file. Got the folder {file}. "
                f"Pass {option} {file / _EXAMPLES[option]}"
            )
        if not file.parent.is_dir():
            raise ValueError(
                f"{option} must name a file in an existing folder. Got {option} {file}. "
                f"Run: mkdir -p {file.parent}"
            )
        check_writable(file)
    except OSError as error:
        raise unwritten(option, file, error) from error


def _is_same(one: Path, other: Path) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return one.exists() and other.exists() and os.path.samefile(one, other)
