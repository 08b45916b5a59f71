"""How far the peak of one and the same window moves on TensorFlow, from run to run.

Operations that do not wait for each other run in an order that changes, and with it what is held
at once. No plan can state a peak more exactly than that.

Usage: python benchmarks/peak_scatter.py [--engine keras] [--models MLP CNN] [--runs 40]
"""

import argparse
import json
import os
import subprocess
import sys

import plan
from plan_models import MODELS, ROWS

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="tensorflow", choices=list(SETTINGS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--one", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.engine, arguments.one, arguments.runs)))
        return
    program = [sys.executable, __file__, "--engine", arguments.engine]
    program += ["--runs", str(arguments.runs)]
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_CPU_ALLOCATOR_USE_BFC": "true",
        "KERAS_BACKEND": "tensorflow",
    }
    print(f"MB of {arguments.runs} runs of the same window: least, most, most / least")
    for name in arguments.models:
        child = subprocess.run(
            [*program, "--one", name],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
            check=True,
        )
        for size, (least, most) in json.loads(child.stdout.splitlines()[-1]).items():
            print(
                f"{name:20}{size:>4} rows{least / 1e6:9.1f}{most / 1e6:9.1f}{most / least:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
