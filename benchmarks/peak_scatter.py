"""How far the peak of one and the same window moves on TensorFlow, from run to run.

Operations that do not wait for each other run in an order that changes, and with it what is held
at once. No plan can state a peak more exactly than that.

Usage: python benchmarks/peak_scatter.py [--engine keras] [--models MLP CNN] [--runs 40]
"""

import plan
from command import apart, parser_of, save
from plan_models import MODELS, ROWS

from virtualbatch.bench.children import tell

SIZES = (64, ROWS)
SETTINGS = {"tensorflow": plan.on_tensorflow, "keras": plan.on_keras}


def measured(engine: str, name: str, runs: int) -> dict[int, tuple[int, int]]:
    """Size -> (least, most) bytes of the runs of its window, beyond what exists before."""
    setting = SETTINGS[engine](name)
    import tensorflow as tf

    found = {}
    for size in SIZES:
        run = setting.window(size)
        # The first runs of a graph need more than later ones.
        run(), run()
        before = tf.config.experimental.get_memory_info("CPU:0")["current"]
        peaks = []
        for _ in range(runs):
            tf.config.experimental.reset_memory_stats("CPU:0")
            run()
            peaks.append(tf.config.experimental.get_memory_info("CPU:0")["peak"] - before)
        found[size] = (min(peaks), max(peaks))
    return found


def main() -> None:
    parser = parser_of(__doc__, models=MODELS, runs=40)
    parser.add_argument("--engine", default="tensorflow", choices=list(SETTINGS))
    arguments = parser.parse_args()
    if arguments.one:
        tell(measured(arguments.engine, *arguments.one, arguments.runs))
        return
    print(f"MB of {arguments.runs} runs of the same window: least, most, most / least")
    results = {}
    for name in arguments.models:
        found = apart(name, KERAS_BACKEND="tensorflow", **plan.COUNTED)
        results[name] = found
        for size, (least, most) in found.items():
            print(
                f"{name:20}{size:>4} rows{least / 1e6:9.1f}{most / 1e6:9.1f}{most / least:7.2f}",
                flush=True,
            )
    save(arguments.json, results)


if __name__ == "__main__":
    main()
