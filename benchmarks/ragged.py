"""What packing saves on ragged text: a window padded, trimmed in the order of the rows, and packed.

A transformer of three layers tags the tokens of 128 rows that are padded to 256; lengths are
log-normal. All contenders compute the gradient of the whole batch, and it is compared with that of
the padded one in the same run. They run in turns in one process an engine, packing included; the
padded loop is compiled as a whole where that is faster, so it is the best of its engine.

Usage: python benchmarks/ragged.py [--engines torch keras-jax] [--rounds 7] [--json FILE]
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from children import result_of
from ragged_contenders import ENGINES, PADDED
from ragged_model import LENGTH, MICROBATCH_SIZE, ROWS, TOKENS, data

NAMES = ["torch", "tensorflow", "jax", "keras-torch", "keras-tensorflow", "keras-jax"]


def measured(engine: str, rounds: int, threads: int) -> dict[str, Any]:
    """Milliseconds of each contender, how much faster, and how far gradients differ."""
    engine, _, backend = engine.partition("-")
    # Read when Keras is imported.
    os.environ["KERAS_BACKEND"] = backend or "tensorflow"
    contenders = ENGINES[engine](threads)
    found = {name: run() for name, run in contenders.items()}
    # Some gradients of Keras' attention are zero but for rounding, so all share one measure.
    largest = max(np.abs(gradient).max() for gradient in found[PADDED])
    off = {
        name: max(
            float(np.abs(a - b).max() / largest)
            for a, b in zip(gradients, found[PADDED], strict=True)
        )
        for name, gradients in found.items()
    }
    if max(off.values()) > 1e-5:
        raise AssertionError(f"gradients differ: {off}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        # Whoever comes first in a round may find other caches.
        for name in sorted(contenders, reverse=bool(turn % 2)):
            start = time.perf_counter()
            contenders[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {
            "ms": float(np.median(found)),
            "spread": [min(found), max(found)],
            "faster": float(np.median(np.divide(times[PADDED], found))),
            "gradient off by": off[name],
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one, arguments.rounds, arguments.threads)))
        return
    _, lengths = data()
    print(
        f"{ROWS} rows padded to {LENGTH}, {lengths.mean():.0f} tokens each on average; "
        f"micro-batches of {MICROBATCH_SIZE} padded rows or {TOKENS} tokens"
    )
    results = {}
    threads = str(arguments.threads)
    for engine in arguments.engines:
        options = ["--one", engine, "--rounds", str(arguments.rounds), "--threads", threads]
        results[engine] = result_of(__file__, options, 460, OMP_NUM_THREADS=threads)
        print(
            f"\n{engine:30}{'ms':>8}{'fastest':>9}{'slowest':>9}{'times as fast':>15}{'off by':>10}"
        )
        for name, found in results[engine].items():
            low, high = found["spread"]
            print(
                f"{name:30}{found['ms']:8.0f}{low:9.0f}{high:9.0f}{found['faster']:15.2f}"
                f"{found['gradient off by']:10.1e}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
