"""The parent of a benchmark: says what is measured and starts a process for each case."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import ALL_PEERS, NO_PEERS, VIRTUALBATCH, WHOLE_BATCH
from virtualbatch.bench.order import RESULT, Order
from virtualbatch.bench.result import BenchResult, Comparison, Peak, Row
from virtualbatch.bench.settings import Settings
from virtualbatch.bench.sweeps import SWEEPS, peer_along

CHILD = ("-m", "virtualbatch.bench.child")
_SECONDS_PER_CHILD = 600
_LINES_OF_STDERR = 20
_PACKAGES = (
    "virtualbatch",
    "numpy",
    "torch",
    "jax",
    "tensorflow",
    "keras",
    "optax",
    "accelerate",
    "lightning",
    "transformers",
)
_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3"}
_OF_PEAKS = {
    # Freed blocks go back at once, so that the peak is what was in use and not what glibc kept.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}


class _Failure(RuntimeError):
    """A case's process ended without a result."""


def run_bench(
    settings: Settings, say: Callable[[str], object], child: Sequence[str] = CHILD
) -> BenchResult:
    """Measures. A case that ends without a result is noted, and the others are measured.

    Args:
        settings: what.
        say: is told what is about to be measured.
        child: arguments for Python that start a child.
    """
    machine = _machine()
    failures: list[str] = []

    def comparisons_of(order: Order) -> list[Comparison]:
        try:
            return _comparisons(order, child)
        except _Failure as failure:
            failures.append(str(failure))
            return []

    comparisons: list[Comparison] = []
    for engine in settings.chosen_engines:
        for model in settings.chosen_models:
            say(f"{engine}, {model}")
            peers = ALL_PEERS if settings.peers == ALL_PEERS else []
            order = Order([Case(engine, model)], peers, settings.rounds, settings.seconds_per_turn)
            comparisons += comparisons_of(order)
    sweeps: dict[str, list[Comparison]] = {}
    peaks: dict[str, list[Peak]] = {}
    for name, sweep in SWEEPS.items() if settings.sweeps else ():
        sweeps[name], peaks[name] = [], []
        for engine in settings.chosen_engines:
            peers = [] if settings.peers == NO_PEERS else [peer_along(engine)]
            for model in sweep.cuts:
                say(f"{engine}, {model}, by {name}")
                cases = sweep.cases(engine, model)
                order = Order(cases, peers, settings.sweep_rounds, settings.seconds_per_turn)
                sweeps[name] += comparisons_of(order)
            for case in sweep.peak_cases(engine):
                for contender in (VIRTUALBATCH, WHOLE_BATCH, *peers):
                    say(f"{engine}, memory of {contender}, by {name}")
                    try:
                        peaks[name].append(peak_of(case, contender, child))
                    except _Failure as failure:
                        failures.append(str(failure))
    return BenchResult(
        machine,
        {package: _version(package) for package in _PACKAGES},
        settings.absent_engines,
        comparisons,
        sweeps,
        peaks,
        failures,
    )


def _comparisons(order: Order, child: Sequence[str]) -> list[Comparison]:
    found = _run(order, child)
    return [
        Comparison(case, [Row(**row) for row in rows])
        for case, rows in zip(order.cases, found, strict=True)
    ]


def peak_of(case: Case, name: str, child: Sequence[str] = CHILD) -> Peak:
    """Measures the memory of a contender's update.

    Args:
        case: what is run.
        name: of the contender.
        child: arguments for Python that start a child.
    """
    return Peak(case, name, _run(Order([case], [name], 0, 0.0, peak_of=name), child))


def _run(order: Order, child: Sequence[str]) -> Any:
    framework = order.cases[0].framework
    environment = os.environ | _ENVIRONMENT
    if order.peak_of is not None:
        environment |= _OF_PEAKS
    # Loops of one's own use Keras' models with TensorFlow too.
    environment["KERAS_BACKEND"] = framework
    failure = f"{_named(order)} ended without a result. "
    try:
        done = subprocess.run(
            [sys.executable, *child, order.to_json()],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS_PER_CHILD,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _Failure(f"{failure}Got none in {_SECONDS_PER_CHILD} s.") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode != 0 or not lines:
        last = "\n".join(done.stderr.splitlines()[-_LINES_OF_STDERR:])
        raise _Failure(f"{failure}Got exit code {done.returncode}.\n{last}")
    return json.loads(lines[-1].removeprefix(RESULT))


def _named(order: Order) -> str:
    first = order.cases[0]
    what = f"Memory of {order.peak_of}" if order.peak_of else "The case"
    cut = f"{first.accumulation_steps} micro-batches of {first.microbatch_size}"
    more = f" and {len(order.cases) - 1} more" if len(order.cases) > 1 else ""
    return f"{what}, {first.engine}, {first.model}, {cut}{more},"


def _machine() -> str:
    gibibytes = psutil.virtual_memory().total / 2**30
    # Programs beside this one move the figures; a reader should know of them.
    load, _, _ = psutil.getloadavg()
    return (
        f"{os.cpu_count()} CPU cores, {gibibytes:.0f} GiB, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, "
        f"load {load:.1f} before the first case"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
