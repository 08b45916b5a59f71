"""The parent of a benchmark: starts a process for each case and collects the results."""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import psutil

from virtualbatch.bench.case import Case
from virtualbatch.bench.children import FREED_AT_ONCE, ChildFailure, result_of
from virtualbatch.bench.contender import ALL_PEERS, NO_PEERS, VIRTUALBATCH, WHOLE_BATCH
from virtualbatch.bench.order import Order
from virtualbatch.bench.result import BenchResult, Comparison, Peak, Row
from virtualbatch.bench.settings import Settings
from virtualbatch.bench.sweeps import SWEEPS, peer_along

CHILD = ("-m", "virtualbatch.bench.child")
_SECONDS_PER_CHILD = 600
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


def run_bench(
    settings: Settings, say: Callable[[str], object], child: Sequence[str] = CHILD
) -> BenchResult:
    """Measures all cases. A case that ends without a result is noted, and the next case starts.

    Args:
        settings: what to measure.
        say: called with the name of each measurement before it starts.
        child: arguments for Python that start a child.
    """
    machine = _machine()
    failures: list[str] = []

    def ran(order: Order) -> list[Any]:
        """A list with the result of an order; empty if there is no result."""
        try:
            return [run(order, child)]
        except ChildFailure as failure:
            failures.append(str(failure))
            return []

    comparisons: list[Comparison] = []
    for engine in settings.chosen_engines:
        for model in settings.chosen_models:
            say(f"{engine}, {model}")
            peers = ALL_PEERS if settings.peers == ALL_PEERS else []
            order = Order([Case(engine, model)], peers, settings.rounds, settings.seconds_per_round)
            comparisons += _comparisons(order, ran(order))
    sweeps: dict[str, list[Comparison]] = {}
    peaks: dict[str, list[Peak]] = {}
    for name, sweep in SWEEPS.items() if settings.sweeps else ():
        sweeps[name], peaks[name] = [], []
        for engine in settings.chosen_engines:
            peers = [] if settings.peers == NO_PEERS else [peer_along(engine)]
            for model in sweep.cuts:
                say(f"{engine}, {model}, by {name}")
                cases = sweep.cases(engine, model)
                order = Order(cases, peers, settings.sweep_rounds, settings.seconds_per_round)
                sweeps[name] += _comparisons(order, ran(order))
            for case in sweep.peak_cases(engine):
                for contender in (VIRTUALBATCH, WHOLE_BATCH, *peers):
                    say(f"{engine}, memory of {contender}, by {name}")
                    order = Order([case], [contender], peak_of=contender)
                    peaks[name] += [Peak(case, contender, found) for found in ran(order)]
    return BenchResult(
        machine,
        {package: _version(package) for package in _PACKAGES},
        settings.absent_engines,
        comparisons,
        sweeps,
        peaks,
        failures,
    )


def _comparisons(order: Order, results: Sequence[Any]) -> list[Comparison]:
    return [
        Comparison(case, [Row(**row) for row in rows])
        for found in results
        for case, rows in zip(order.cases, found, strict=True)
    ]


def run(order: Order, child: Sequence[str] = CHILD) -> Any:
    """The result of a child: for each case one row per contender, or the bytes of a peak.

    Raises:
        ChildFailure: the child ended without a result.
    """
    # Set it for every engine, because hand-written TensorFlow loops use Keras models too.
    environment = {"KERAS_BACKEND": order.cases[0].framework}
    if order.peak_of is not None:
        environment |= FREED_AT_ONCE
    return result_of(_named(order), [*child, order.to_json()], _SECONDS_PER_CHILD, environment)


def _named(order: Order) -> str:
    first = order.cases[0]
    what = f"Memory of {order.peak_of}" if order.peak_of else "The case"
    cut = f"{first.accumulation_steps} micro-batches of {first.microbatch_size}"
    more = f" and {len(order.cases) - 1} more" if len(order.cases) > 1 else ""
    return f"{what}, {first.engine}, {first.model}, {cut}{more},"


def _machine() -> str:
    gibibytes = psutil.virtual_memory().total / 2**30
    # Other programs on the machine change the figures, so the load is shown.
    load, _, _ = psutil.getloadavg()
    return (
        f"{os.cpu_count()} CPU cores, {gibibytes:.0f} GiB, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, "
        f"load {load:.1f} before the first case, {date.today():%Y-%m-%d}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
