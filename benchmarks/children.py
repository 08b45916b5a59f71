"""Each case of a benchmark in a process of its own, where it finds nothing that another left."""

import json
import os
import subprocess
import sys
from typing import Any


def result_of(script: str, arguments: list[str], seconds: float, **variables: str) -> Any:
    """What a script prints on its last line, which is JSON.

    Args:
        script: its file.
        arguments: of its command line.
        seconds: after which it is ended.
        variables: of its environment, beside those of this process.

    Raises:
        RuntimeError: it failed; with what it wrote to stderr.
    """
    child = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | variables,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])
