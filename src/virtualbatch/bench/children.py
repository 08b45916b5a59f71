"""A measurement in a process of its own, where it finds nothing that another left."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Freed blocks go back at once, so that a peak is what was in use and not what glibc kept.
FREED_AT_ONCE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
# Frameworks print too; the line that starts so is ours.
_RESULT = "virtualbatch bench: "
_LINES_OF_STDERR = 20


class ChildFailure(RuntimeError):
    """A process ended without a result."""


def tell(found: Any) -> None:
    """Prints for the parent what was found, as JSON."""
    print(_RESULT + json.dumps(found), flush=True)


def result_of(
    what: str, arguments: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> Any:
    """What a child tells.

    Args:
        what: it measures, for an error.
        arguments: for Python that start it.
        seconds: after which it is ended.
        environment: variables beside those of this process.

    Raises:
        ChildFailure: it ended without a result; holds its exit code and last lines.
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
