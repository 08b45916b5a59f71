"""How well a plan predicts memory, and whether the size that it chooses is fast.

Ten models for each engine, each in a process of its own. Two plans are made, one without a limit
and one in which 60 % of the batch's activations fit. Every larger peak that they measured is
compared with what the search predicts from those of 8 and 32 rows. Then all sizes are timed, in
turns, and the chosen one is compared with the fastest.

Usage: python benchmarks/plan.py [--engines torch jax] [--models MLP CNN] [--json FILE]
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plan_models import MODELS, ROWS, data, in_keras, in_torch

from virtualbatch.search import Question, Search

ENGINES = ["jax", "torch", "tensorflow", "keras"]
# What the project promises: largest error of a predicted peak, and least share of the throughput.
ERRORS = {"jax": 0.03, "torch": 0.10, "tensorflow": 0.15, "keras": 0.15}
THROUGHPUT = 0.95
LIMIT = 0.6
ROUNDS = 5

# (memory limit -> plan, size -> function that runs a whole batch and waits for it)
Setting = tuple[Callable[[int | None], Any], Callable[[int], Callable[[], Any]]]


def on_jax(name: str) -> Setting:
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import jax.numpy as jnp

    import virtualbatch.jax as vb

    model = in_keras(name)
    fixed = [variable.value for variable in model.non_trainable_variables]
    params = [variable.value for variable in model.trainable_variables]

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        logits, _ = model.stateless_call(params, fixed, x, training=True)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    batch = jax.tree.map(jnp.asarray, data(name))

    def window(size: int) -> Callable[[], Any]:
        run = jax.jit(vb.value_and_grad(loss, microbatch_size=size))
        return lambda: jax.block_until_ready(run(params, batch))

    return lambda limit: vb.plan(loss, memory_limit=limit)(params, batch), window


def on_torch(name: str) -> Setting:
    import torch

    import virtualbatch.torch as vb

    torch.set_num_threads(1)
    module, loss_fn = in_torch(name)
    batch = [torch.as_tensor(array) for array in data(name)]

    def window(size: int) -> Callable[[], Any]:
        def run() -> None:
            module.zero_grad()
            vb.backward(loss_fn, batch, module=module, microbatch_size=size)

        return run

    return lambda limit: vb.plan(loss_fn, batch, module=module, memory_limit=limit), window


def on_tensorflow(name: str) -> Setting:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tensorflow as tf

    import virtualbatch.tensorflow as vb

    model = in_keras(name)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batch = tuple(tf.constant(array) for array in data(name))

    def loss_fn(batch: Any) -> Any:
        return loss_of(batch[1], model(batch[0], training=True))

    def window(size: int) -> Callable[[], Any]:
        def run(batch: Any) -> Any:
            return vb.value_and_gradients(
                loss_fn, batch, model.trainable_variables, microbatch_size=size
            )

        compiled = tf.function(run)
        return lambda: compiled(batch)[0].numpy()

    return lambda limit: vb.plan(
        loss_fn, batch, model.trainable_variables, memory_limit=limit
    ), window


def on_keras(name: str) -> Setting:
    import keras

    import virtualbatch.keras as vb

    model = in_keras(name)
    model.compile(
        optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    batch = data(name)

    def window(size: int) -> Callable[[], Any]:
        model = in_keras(name)
        model.compile(
            optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        vb.accumulate(model, microbatch_size=size)
        return lambda: model.train_on_batch(*batch)

    return lambda limit: vb.plan(model, batch, memory_limit=limit), window


def measured(engine: str, name: str) -> dict[str, Any]:
    """Plans one model and checks what the plan says."""
    begin = time.perf_counter()
    plan, window = globals()[f"on_{engine}"](name)
    found = plan(None)
    spent = time.perf_counter() - begin
    small, whole = found.rows[0].peak_bytes, found.rows[-1].peak_bytes
    limit = int(max(small, small + LIMIT * (whole - small)))
    try:
        plans = [found, plan(limit)]
    except ValueError:
        # Where sizes make no difference to a peak, its noise decides.
        plans = [found]
    sizes = [size for size in (4, 8, 16, 32, 64, 128, 256) if size <= ROWS]
    sizes = sorted({*sizes, found.microbatch_size})
    programs = {size: window(size) for size in sizes}
    seconds = {size: float("inf") for size in sizes}
    for run in programs.values():
        run()
    for _ in range(ROUNDS):
        for size, run in programs.items():
            start = time.perf_counter()
            run()
            seconds[size] = min(seconds[size], time.perf_counter() - start)
    fastest = min(seconds, key=lambda size: seconds[size])
    return {
        "chosen": found.microbatch_size,
        "fastest": fastest,
        "throughput": seconds[fastest] / seconds[found.microbatch_size],
        "against_uncut": seconds[ROWS] / seconds[found.microbatch_size],
        "error": prediction_error(engine, plans),
        "limit": limit,
        "limited": [[r.microbatch_size, r.peak_bytes, r.measured] for r in plans[-1].rows],
        "seconds_to_plan": spent,
        "rows": [[row.microbatch_size, row.peak_bytes, row.measured] for row in found.rows],
    }


def prediction_error(engine: str, plans: list[Any]) -> float | None:
    """The largest error of what the search predicts once it was told the peaks of 8 and 32 rows.

    The whole batch does not count: uncut, no sum of gradients stands beside those of a part.

    Returns:
        A share of the measured peak; None where no larger size was measured.
    """
    known = {r.microbatch_size: r.peak_bytes for plan in plans for r in plan.rows if r.measured}
    if not {8, 32} <= set(known):
        return None
    search = Search(ROWS, memory_limit=2**60)
    for size in (8, 32):
        search.tell(Question("memory", size), known[size])
    errors = [
        abs(search.predicted(largest_piece(engine, size)) / peak - 1)
        for size, peak in known.items()
        if 32 < size < ROWS
    ]
    return max(errors, default=None)


def largest_piece(engine: str, size: int) -> int:
    """Rows of the largest micro-batch; eager engines cut a batch evenly."""
    return math.ceil(ROWS / math.ceil(ROWS / size)) if engine == "torch" else size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(*arguments.one)))
        return
    results: dict[str, dict[str, Any]] = {}
    for engine in arguments.engines:
        print(f"\n{engine}: peaks within {ERRORS[engine]:.0%}, {THROUGHPUT:.0%} of the fastest")
        print(
            f"{'':20}{'chosen':>8}{'fastest':>8}{'speed':>8}{'/ uncut':>8}{'peak off':>9}{'s':>7}"
        )
        for name in arguments.models:
            found = in_a_process(engine, name)
            results.setdefault(engine, {})[name] = found
            off = "" if found["error"] is None else f"{found['error']:.1%}"
            print(
                f"{name:20}{found['chosen']:8}{found['fastest']:8}{found['throughput']:8.2f}"
                f"{found['against_uncut']:8.2f}{off:>9}{found['seconds_to_plan']:7.1f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def in_a_process(engine: str, name: str) -> dict[str, Any]:
    """A process of its own, so that no peak is that of another model."""
    child = subprocess.run(
        [sys.executable, __file__, "--one", engine, name],
        # The allocator that counts, as `virtualbatch plan` chooses it.
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_CPU_ALLOCATOR_USE_BFC": "true"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"{name} on {engine} failed:\n{child.stderr}")
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
