"""Keras on JAX, batches of many row counts: ours beside plain `fit`, a process of its own each.

Each number of rows is a program of its own, on plain Keras too. Time is that of all windows,
compiling included; "later" is that of the second half, in which nothing is compiled. "cpu" is the
time of the processor, which says more on a shared machine. Memory is what a process holds at the
end, and at most. "padded" is ours on rows of weight 0, up to a multiple of the micro-batch.
Processes alternate; the ratios are medians over the rounds.

Usage: python benchmarks/keras_row_counts.py [--counts 64] [--windows 2000] [--rounds 3]
"""

import os
import resource
from statistics import median
from time import perf_counter, process_time
from typing import Any

from command import apart, parser_of, save

from virtualbatch.bench.children import tell

MICROBATCH_SIZE = 16
WAYS = ("plain", "ours", "padded")
# Ours over plain that the project promises.
TARGETS = {"held_mib": 1.05, "peak_mib": 1.05, "seconds": 1.10, "cpu": 1.10, "later": 1.10}


def measured(way: str, counts: int, windows: int) -> dict[str, float]:
    """Seconds and MiB of one way, measured in this process."""
    import keras
    import numpy as np
    from keras import layers

    import virtualbatch.keras as vb

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32,)),
            layers.Dense(64, activation="tanh"),
            layers.Dense(64, activation="tanh"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    model.compile("adam", loss, metrics=["accuracy"])
    if way != "plain":
        vb.accumulate(model, microbatch_size=MICROBATCH_SIZE)
    rng = np.random.default_rng(0)
    most = 2 * MICROBATCH_SIZE + counts
    x, y = rng.normal(size=(most, 32)).astype("float32"), rng.integers(0, 10, most)

    def batch(window: int) -> Any:
        rows = 2 * MICROBATCH_SIZE + 1 + window % counts
        if way != "padded":
            return x[:rows], y[:rows]
        # Rows of weight 0 count in BatchNorm, and in metrics without weights.
        whole = -(-rows // MICROBATCH_SIZE) * MICROBATCH_SIZE
        weight = (np.arange(whole) < rows).astype("float32")
        return x[:whole], y[:whole], weight

    def fit(first: int, last: int) -> float:
        start = perf_counter()
        batches = (batch(window) for window in range(first, last))
        model.fit(batches, steps_per_epoch=last - first, verbose=0)
        return perf_counter() - start

    start = process_time()
    first = fit(0, windows // 2)
    later = fit(windows // 2, windows)
    cpu = process_time() - start
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "held_mib": held / 2**20,
        "peak_mib": peak / 2**10,
        "seconds": first + later,
        "cpu": cpu,
        "later": later,
    }


def main() -> None:
    parser = parser_of(__doc__, ways=WAYS, counts=64, windows=2000, rounds=3)
    arguments = parser.parse_args()
    if arguments.one:
        tell(measured(arguments.one[0], arguments.counts, arguments.windows))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    for _ in range(arguments.rounds):
        for way in arguments.ways:
            found[way].append(apart(way, KERAS_BACKEND="jax", OMP_NUM_THREADS="1"))
    print(f"{arguments.windows} windows of {arguments.counts} row counts")
    for way in arguments.ways:
        for name, target in TARGETS.items():
            value = median(run[name] for run in found[way])
            pairs = zip(found[way], found["plain"], strict=True)
            ratio = median(mine[name] / theirs[name] for mine, theirs in pairs)
            met = "ok" if ratio <= target else f"asked <= {target}"
            verdict = met if way == "ours" else ""
            print(f"{way:8} {name:9} {value:9.1f}  {ratio:6.3f} {verdict}", flush=True)
    save(arguments.json, found)


if __name__ == "__main__":
    main()
