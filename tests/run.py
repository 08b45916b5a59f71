"""Runs the parts of the test suite, two at a time, and says what each cost.

    python tests/run.py              the quick tier of every part
    python tests/run.py --thorough   everything
    python tests/run.py torch jax    some parts

What pytest printed, the times of all tests included, stays in build/durations/PART.txt.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DURATIONS = ROOT / "build" / "durations"
COMPILED = ROOT / "build" / "compiled"
AT_ONCE = 2


class Part(NamedTuple):
    """Tests that share a process: what frameworks compile and keep would fill one for all.

    Fields:
        paths: what pytest collects.
        environment: variables of the process.
    """

    paths: Sequence[str]
    environment: Mapping[str, str] = {}


# Most of the time would go into optimising programs that run once, and into compiling the same
# ones for one test after another.
JAX = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# Longest first. Keras takes one backend per process.
PARTS = {
    "keras-jax": Part(["tests/keras"], {"KERAS_BACKEND": "jax"} | JAX),
    "keras-tensorflow": Part(["tests/keras"], {"KERAS_BACKEND": "tensorflow"}),
    "jax": Part(["tests/jax"], JAX),
    "tensorflow": Part(["tests/tensorflow"]),
    "keras-torch": Part(["tests/keras"], {"KERAS_BACKEND": "torch"}),
    "conformance": Part(["tests/conformance"], JAX),
    "programs": Part(
        ["tests/core", "tests/typed", *sorted(str(file) for file in ROOT.glob("tests/test_*.py"))]
    ),
    "torch": Part(["tests/torch"]),
    "transformers": Part(["tests/transformers", "tests/accelerate"]),
    "lightning": Part(["tests/lightning"]),
}


class Ran(NamedTuple):
    """A part that has run.

    Fields:
        status: exit status of pytest; 0 where all passed.
        passed: number of tests that passed.
        cpu: user and system seconds, those of its own children included.
        wall: seconds.
        output: what it printed.
    """

    status: int
    passed: int
    cpu: float
    wall: float
    output: str


def run(name: str, options: Sequence[str]) -> Ran:
    """Runs one part in a process of its own."""
    environment = os.environ | PARTS[name].environment
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" in PARTS[name].environment:
        # Another checkout's programs would be found under the same names.
        shutil.rmtree(COMPILED / name, ignore_errors=True)
        environment["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED / name)
    file = DURATIONS / f"{name}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "--durations=0", *options, *PARTS[name].paths]
    start = time.perf_counter()
    with file.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        # Unlike `wait`, it says what this child used, and what the children that it waited for did.
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    text = file.read_text(errors="replace")
    passed = re.findall(r"^=+ .*?(\d+) passed", text, re.MULTILINE)
    return Ran(
        child.returncode,
        int(passed[-1]) if passed else 0,
        usage.ru_utime + usage.ru_stime,
        time.perf_counter() - start,
        text,
    )


def without_durations(output: str) -> str:
    """What pytest printed, but for the times of single tests."""
    return re.sub(r"^=+ slowest durations =+\n(?:(?!=).*\n)*", "", output, flags=re.MULTILINE)


def table(ran: Mapping[str, Ran], wall: float) -> str:
    """One line for each part, and the sums."""
    lines = [f"{'part':18}{'passed':>8}{'CPU s':>10}{'wall s':>10}"]
    for name, found in ran.items():
        failed = f"  FAILED (exit status {found.status})" if found.status else ""
        lines.append(f"{name:18}{found.passed:8}{found.cpu:10.1f}{found.wall:10.1f}{failed}")
    passed, cpu = sum(r.passed for r in ran.values()), sum(r.cpu for r in ran.values())
    return "\n".join([*lines, f"{'all':18}{passed:8}{cpu:10.1f}{wall:10.1f}"])


def main(arguments: Iterable[str]) -> int:
    parser = argparse.ArgumentParser(description="Runs the parts of the test suite.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--thorough", action="store_true", help="also the tests so marked")
    asked = parser.parse_args([*arguments])
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    names = [name for name in PARTS if name in (asked.parts or PARTS)]
    options = [] if asked.thorough else ["-m", "not thorough"]
    start, ran = time.perf_counter(), {}
    with ThreadPoolExecutor(AT_ONCE) as workers:
        started = {workers.submit(run, name, options): name for name in names}
        for done in as_completed(started):
            name = started[done]
            ran[name] = done.result()
            print(f"\n== {name}\n{without_durations(ran[name].output)}", flush=True)
    print(table({name: ran[name] for name in names}, time.perf_counter() - start))
    return int(any(found.status for found in ran.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
