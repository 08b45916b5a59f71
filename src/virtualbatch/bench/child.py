"""The child process of the benchmark: reads an order as JSON and prints its results as JSON."""

import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from virtualbatch.bench.case import Case
from virtualbatch.bench.children import tell
from virtualbatch.bench.comparison import compared, lasting
from virtualbatch.bench.contender import ALL_PEERS, FLOOR, VIRTUALBATCH, WHOLE, Absent, Contender
from virtualbatch.bench.order import Order
from virtualbatch.plan.host_memory import give_back_freed_memory

_SECONDS_TO_SETTLE = 1.0


def entries(case: Case, peers: str | Sequence[str]) -> list[Contender | Absent]:
    """The contenders of a case, including the requested peers."""
    module = importlib.import_module(f"virtualbatch.bench.{case.engine.split('-')[0]}_ways")
    found: list[Contender | Absent] = module.entries(case)
    if peers == ALL_PEERS:
        return found
    always = [VIRTUALBATCH, *(entry.name for entry in found if _is_measure(entry))]
    return [entry for entry in found if entry.name in (*always, *peers)]


def _is_measure(entry: Contender | Absent) -> bool:
    return isinstance(entry, Contender) and entry.role in (FLOOR, WHOLE)


def _peak(case: Case, name: str) -> int | None:
    """Bytes that an update takes above the memory of the process between two updates."""
    from virtualbatch.demo.peak_memory import PeakMemory

    found = next(entry for entry in entries(case, [name]) if entry.name == name)
    if isinstance(found, Absent):
        return None
    # The first update compiles.
    found.train(1)
    # A framework's threads may free memory after the result of an update is available.
    time.sleep(_SECONDS_TO_SETTLE)
    # The measurement would miss memory that the C library keeps and uses again.
    give_back_freed_memory()
    peak = PeakMemory()
    found.train(1)
    return peak.stop()


def main() -> None:
    """Reads the order from the only argument."""
    order = Order.from_json(sys.argv[1])
    if order.peak_of is not None:
        tell(_peak(order.cases[0], order.peak_of))
        return
    groups = [entries(case, order.peers) for case in order.cases]
    rows = compared(groups, order.rounds, lasting(order.seconds_per_round))
    tell([[asdict(row) for row in group] for group in rows])


if __name__ == "__main__":
    main()
