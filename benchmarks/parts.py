"""Whether a few micro-batches tell how long a whole batch takes, where windows are programs.

A plan times whole batches on JAX, TensorFlow and Keras. A program of the first few micro-batches
would be over sooner, and could be measured more often; but it has to be built too, and what a
window does once counts for more in it.

Usage: python benchmarks/parts.py [--engines jax keras] [--models CNN] [--seconds 60] [--json FILE]
"""

import math
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import plan
from command import apart, parser_of, save
from plan_models import MODELS, ROWS

from virtualbatch.bench.children import tell
from virtualbatch.bench.rounds import seconds_of

SETTINGS = {"jax": plan.on_jax, "tensorflow": plan.on_tensorflow, "keras": plan.on_keras}
SIZES = (8, 32, 64)
# Seconds of micro-batches in a part, as on PyTorch, where they need no program of their own.
MOMENT = 0.1
FEWEST = 2


class Built(NamedTuple):
    """A window that has run once.

    Fields:
        run: runs it and waits for it.
        seconds: to build it.
    """

    run: Callable[[], Any]
    seconds: float


def built(engine: str, name: str, size: int, rows: int) -> Built:
    """The window of a size for the first rows of the batch."""
    setting = SETTINGS[engine](name, rows)
    start = time.perf_counter()
    run = setting.window(size)
    run()
    first = time.perf_counter() - start
    return Built(run, first - seconds_of(run))


def measured(engine: str, name: str, seconds: float) -> list[dict[str, float]]:
    """Times of whole batches and of parts, in interleaved rounds.

    Returns:
        For each size its rows, those of the part, the time of the whole batch that follows from
        the part as a share of the true one, and the seconds to build the part in whole batches.
    """
    wholes, parts, rows = {}, {}, {}
    for size in SIZES:
        wholes[size] = built(engine, name, size, ROWS)
        each = seconds_of(wholes[size].run) * size / ROWS
        rows[size] = min(ROWS, size * max(FEWEST, math.ceil(MOMENT / each)))
        parts[size] = built(engine, name, size, rows[size])
    times: dict[tuple[int, bool], list[float]] = {}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for is_part, windows in ((False, wholes), (True, parts)):
            for size, window in windows.items():
                times.setdefault((size, is_part), []).append(seconds_of(window.run))
    return [
        {
            "size": size,
            "rows": rows[size],
            "told": fmean(times[size, True]) * ROWS / rows[size] / fmean(times[size, False]),
            "building": parts[size].seconds / fmean(times[size, False]),
        }
        for size in SIZES
    ]


def main() -> None:
    # Of each model.
    parser = parser_of(__doc__, engines=SETTINGS, models=MODELS, seconds=60.0)
    arguments = parser.parse_args()
    if arguments.one:
        tell(measured(*arguments.one, arguments.seconds))
        return
    print(f"the time of {ROWS} rows as a part tells it / the true one; building it in true ones")
    results: dict[str, list[dict[str, float]]] = {}
    for engine in arguments.engines:
        for name in arguments.models:
            found = apart(engine, name, seconds=arguments.seconds + 300, **plan.COUNTED)
            results[f"{engine} {name}"] = found
            for line in found:
                print(
                    f"{engine + ' ' + name:32}{line['size']:4} rows, part of {line['rows']:3}: "
                    f"{line['told']:5.2f}{line['building']:8.1f}",
                    flush=True,
                )
    save(arguments.json, results)


if __name__ == "__main__":
    main()
