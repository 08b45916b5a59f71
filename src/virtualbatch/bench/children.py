"""Runs a measurement in its own process, so that earlier measurements do not affect it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Freed blocks return to the system at once, so that a peak shows memory in use, not memory that
# glibc keeps.
FREED_AT_ONCE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
# The result is on the line with this prefix; frameworks print other lines.
_RESULT = "virtualbatch bench: "
_LINES_OF_STDERR = 20


class ChildFailure(RuntimeError):
    """A process ended without a result."""


def tell(found: Any) -> None:
    """Prints a result for the parent, as JSON."""
    print(_RESULT + json.dumps(found), flush=True)


def result_of(
    what: str, arguments: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> Any:
    """The result of a child process.

    Args:
        what: the measurement in words, for errors.
        arguments: arguments for Python that start the child.
        seconds: time limit of the child.
        environment: variables in addition to those of this process.

    Raises:
        ChildFailure: the child ended without a result. Its text has the exit code and last lines.
    """
    failure = f"{what} ended without a result. "
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ChildFailure(f"{failure}Got none in {seconds} s.") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode != 0 or not lines:
        last = "\n".join(done.stderr.splitlines()[-_LINES_OF_STDERR:])
        raise ChildFailure(f"{failure}Got exit code {done.returncode}.\n{last}")
    return json.loads(lines[-1].removeprefix(_RESULT))
