"""What packing saves on ragged text: a window padded, trimmed in the order of the rows, and packed.

A transformer of three layers tags the tokens of 128 rows that are padded to 256; lengths are
log-normal. All contenders compute the gradient of the whole batch, and it is compared with that of
the padded one in the same run. They run in interleaved rounds in one process an engine, packing
included; the padded loop is compiled as a whole where that is faster, so it is the best of its
engine.

Usage: python benchmarks/ragged.py [--engines torch keras-jax] [--rounds 7] [--json FILE]
"""

import os
from functools import partial
from typing import Any

import numpy as np
from command import apart, parser_of, save
from ragged_contenders import ENGINES, PADDED
from ragged_model import LENGTH, MICROBATCH_SIZE, ROWS, TOKENS, data

from virtualbatch.bench.children import tell
from virtualbatch.bench.rounds import in_rounds, seconds_of

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
    runs = {name: partial(seconds_of, run) for name, run in contenders.items()}
    times = in_rounds(runs, rounds)
    return {
        name: {
            "ms": float(np.median(found)) * 1e3,
            "spread": [min(found) * 1e3, max(found) * 1e3],
            "faster": float(np.median(np.divide(times[PADDED], found))),
            "gradient off by": off[name],
        }
        for name, found in times.items()
    }


def main() -> None:
    arguments = parser_of(__doc__, engines=NAMES, rounds=7, threads=2).parse_args()
    if arguments.one:
        tell(measured(*arguments.one, arguments.rounds, arguments.threads))
        return
    _, lengths = data()
    print(
        f"{ROWS} rows padded to {LENGTH}, {lengths.mean():.0f} tokens each on average; "
        f"micro-batches of {MICROBATCH_SIZE} padded rows or {TOKENS} tokens"
    )
    results = {}
    for engine in arguments.engines:
        results[engine] = apart(engine, OMP_NUM_THREADS=str(arguments.threads))
        print(
            f"\n{engine:30}{'ms':>8}{'fastest':>9}{'slowest':>9}{'times as fast':>15}{'off by':>10}"
        )
        for name, found in results[engine].items():
            low, high = found["spread"]
            print(
                f"{name:30}{found['ms']:8.0f}{low:9.0f}{high:9.0f}{found['faster']:15.2f}"
                f"{found['gradient off by']:10.1e}"
            )
    save(arguments.json, results)


if __name__ == "__main__":
    main()
