"""Updates per second against Keras' own accumulation and a hand-written eager loop.

Every contender makes the same updates on the same rows: 8 micro-batches of 32. They run in one
process, in interleaved rounds, so that a busy machine disturbs all of them; ratios of medians are
printed.

Usage: python benchmarks/speed.py [--models MLP CNN] [--rounds 5] [--json FILE]
"""

import os
from dataclasses import asdict

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

from command import parser_of, save
from updates import measured

from virtualbatch.bench.asked import asked
from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import PEER
from virtualbatch.bench.keras_ways import entries
from virtualbatch.bench.result import Row
from virtualbatch.bench.tensorflow_ways import eager_loop

# How the names of peers begin, and the engine whose peer it is.
PEERS = {
    "gradient_accumulation_steps, jit": "keras-tensorflow",
    "gradient_accumulation_steps, steps": "keras-tensorflow",
    "eager loop": "tensorflow",
}


def report(case: Case, rows: list[Row]) -> None:
    """Prints a model's table, then each promise with the peer at its best jit_compile."""
    steps, size = case.accumulation_steps, case.microbatch_size
    print(f"\n{case.model}: {steps} micro-batches of {size}, per update")
    print(f"{'':70} {'median':>8} {'quartiles':>15} {'x ours':>7} {'update off by':>14}")
    for row in rows:
        low, median, high = row.milliseconds
        error = row.verdict if row.error is None else f"{row.error:.1e}"
        print(
            f"{row.name:70} {median:8.2f} {f'{low:.2f}-{high:.2f}':>15} {row.times_ours[1]:7.2f} "
            f"{error:>14}"
        )
    for peer, engine in PEERS.items():
        found = (row for row in rows if row.name.startswith(peer))
        best = min(found, key=lambda row: row.times_ours[1])
        times, target = best.times_ours[1], asked(engine, case.model, best.name, PEER)
        verdict = "ok" if times >= target else "MISSED"
        print(f"  {times:6.2f} x the updates of {best.name}; promised {target:g}: {verdict}")


def main() -> None:
    arguments = parser_of(__doc__, models=("MLP", "CNN"), rounds=5).parse_args()
    result = {}
    for name in arguments.models:
        case = Case("keras-tensorflow", name)
        rows = measured([*entries(case), eager_loop(case)], arguments.rounds)
        result[name] = [asdict(row) for row in rows]
        report(case, rows)
    save(arguments.json, result)


if __name__ == "__main__":
    main()
