"""Programs of several processes on this machine, each started anew, all within a limit."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT


class Ended(NamedTuple):
    """A process that has ended.

    Fields:
        status: its exit status, negative where a signal ended it; None where the limit did.
        output: what it printed.
        seconds: until it ended.
    """

    status: int | None
    output: str
    seconds: float


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]
    finally:
        for found in sockets:
            found.close()


def together(
    module: str,
    arguments: Callable[[int], Sequence[str]],
    environment: Callable[[int], Mapping[str, str]],
    count: int = 2,
    limit: float = 120,
) -> list[Ended]:
    """Runs a module in several processes at once, and ends those that are late.

    Args:
        module: such as "tests.jax.two_processes".
        arguments: number of a process -> its arguments.
        environment: number of a process -> variables besides those of this process.
        count: how many processes.
        limit: seconds for all of them together.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # Files, because a full pipe would stop a process that others wait for.
        outputs = [Path(folder, f"{k}.txt") for k in range(count)]
        children = []
        for k, output in enumerate(outputs):
            with output.open("wb") as printed:
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments(k)],
                        cwd=ROOT,
                        env=os.environ | {"PYTHONPATH": path} | dict(environment(k)),
                        stdout=printed,
                        stderr=subprocess.STDOUT,
                    )
                )
        seconds = _until_they_end(children, began, limit)
        found = []
        for k, child in enumerate(children):
            text = outputs[k].read_text(errors="replace")
            late = k not in seconds
            found.append(Ended(None if late else child.returncode, text, seconds.get(k, limit)))
    return found


def checked_on_four_devices(module: str, checks: Sequence[str], **variables: str) -> None:
    """Runs checks of a program of JAX that needs four devices, which XLA makes when it starts.

    Args:
        module: prints "ok" and the name of each check.
        checks: their names.
        variables: of the environment, besides those of this process.

    Raises:
        AssertionError: a check failed, or did not run.
    """
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        # Before what was given: the package under test may be another one than the installed.
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    child = subprocess.run(
        [sys.executable, "-m", module, *checks],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if child.returncode != 0:
        raise AssertionError(f"{child.stdout[-1000:]}\n{child.stderr[-4000:]}")
    assert child.stdout.split() == [word for name in checks for word in ("ok", name)]


def _until_they_end(
    children: Sequence[subprocess.Popen[bytes]], began: float, limit: float
) -> dict[int, float]:
    """After how many seconds each ended; without those that the limit ended."""
    seconds: dict[int, float] = {}
    while len(seconds) < len(children) and time.monotonic() - began < limit:
        for k, child in enumerate(children):
            if k not in seconds and child.poll() is not None:
                seconds[k] = time.monotonic() - began
        time.sleep(0.02)
    for child in children:
        child.kill()
        child.wait()
    return seconds
