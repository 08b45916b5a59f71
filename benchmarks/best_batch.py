"""Whether the noise scale finds the best batch: its prediction against a grid search.

Three small tasks: digits (classes), text (next letter) and regression. For every batch size, SGD
trains from the same starts with many learning rates until the loss on all data has reached a
target; the best rate counts. Updates times the measured time of an update of that size is the time
of a batch size, and the fastest one is compared with what `NoiseScale.advice` says from windows of
one run: their noise scale, and the time per row and per update from a line through the same times.

Usage: python benchmarks/best_batch.py [--tasks digits text regression] [--json FILE]
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from best_batch_tasks import TASKS, Task
from command import parser_of, save

import virtualbatch.jax as vb
from virtualbatch import NoiseScale
from virtualbatch.bench.rounds import in_rounds, seconds_of

SIZES = [2**k for k in range(1, 11)]
RATES = [2.0 ** (k / 2) for k in range(-16, 5)]
SEEDS = 4
MOST_UPDATES, EVERY = 4096, 2
# A larger batch needs no more updates than a smaller one, but for chance.
CHANCE = 1.3
MICROBATCH_SIZE, WINDOW = 8, 64


def updates_needed(task: Task, size: int, most: float) -> float:
    """Updates to the target, at the best learning rate; mean over starts, infinite beyond most."""

    def trained(rate: Any, seed: Any) -> Any:
        key = jax.random.key(seed)

        def update(params: Any, key: Any) -> tuple[Any, None]:
            rows = jax.random.randint(key, (size,), 0, len(task.x))
            gradient = jax.grad(task.loss)(params, (task.x[rows], task.y[rows]))
            return jax.tree.map(lambda p, g: p - rate * g, params, gradient), None

        def unfinished(state: Any) -> Any:
            _, count, loss = state
            return (loss > task.target) & (count < most)

        def some(state: Any) -> Any:
            params, count, _ = state
            keys = jax.vmap(partial(jax.random.fold_in, key))(count + jnp.arange(EVERY))
            params, _ = jax.lax.scan(update, params, keys)
            return params, count + EVERY, task.loss(params, (task.x, task.y))

        start = task.start(jax.random.fold_in(key, 1 << 20)), 0, jnp.inf
        _, count, loss = jax.lax.while_loop(unfinished, some, start)
        return jnp.where(loss <= task.target, count, jnp.inf)

    rates, seeds = jnp.asarray(RATES), jnp.arange(SEEDS)
    counts = jax.jit(jax.vmap(lambda r: jax.vmap(lambda s: trained(r, s))(seeds)))(rates)
    return float(jnp.min(jnp.mean(counts, 1)))


def update_seconds(task: Task) -> dict[int, float]:
    """Median seconds of one update, for each batch size, in interleaved rounds."""
    params = task.start(jax.random.key(0))

    @jax.jit
    def update(params: Any, batch: Any) -> Any:
        gradient = jax.grad(task.loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    def run(batch: Any) -> None:
        jax.block_until_ready(update(params, batch))

    runs = {}
    for size in SIZES:
        batch = jax.tree.map(partial(_rows, count=size), (task.x[:size], task.y[:size]))
        runs[size] = partial(seconds_of, partial(run, batch))
    # What is compiled is compiled here.
    in_rounds(runs, 1)
    return {size: float(np.median(found)) for size, found in in_rounds(runs, 200).items()}


def _rows(array: Any, count: int) -> Any:
    return jnp.resize(array, (count, *array.shape[1:]))


def noise(task: Task, rate: float) -> NoiseScale:
    """The noise scale along one run to the target, in windows of micro-batches."""
    found = NoiseScale(decay=1.0)
    grad = vb.value_and_grad(task.loss, microbatch_size=MICROBATCH_SIZE, stats=True)

    @jax.jit
    def update(params: Any, key: Any) -> Any:
        rows = jax.random.randint(key, (WINDOW,), 0, len(task.x))
        _, gradient, stats = grad(params, (task.x[rows], task.y[rows]))
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), stats

    key = jax.random.key(7)
    params = task.start(key)
    whole = jax.jit(lambda params: task.loss(params, (task.x, task.y)))
    for count in range(MOST_UPDATES):
        params, stats = update(params, jax.random.fold_in(key, count))
        found.update(stats)
        if count % EVERY == 0 and whole(params) <= task.target:
            break
    return found


def compared(task: Task) -> dict[str, Any]:
    seconds = update_seconds(task)
    updates: dict[int, float] = {}
    most = MOST_UPDATES
    for size in SIZES:
        updates[size] = updates_needed(task, size, most)
        most = min(most, CHANCE * updates[size])
    per_row, per_update = np.polyfit(SIZES, [seconds[size] for size in SIZES], 1)
    scale = noise(task, task.rate)
    advice = scale.advice(seconds_per_row=float(per_row), seconds_per_update=float(per_update))
    times = {size: updates[size] * seconds[size] for size in SIZES}
    best = min(times, key=lambda size: times[size])
    return {
        "noise_scale": advice.noise_scale,
        "overhead_in_rows": float(per_update / per_row),
        "predicted": advice.best_rows,
        "best": best,
        "factor": advice.best_rows / best,
        "slower": {str(size): times[size] / times[best] for size in SIZES},
        "updates": {str(size): updates[size] for size in SIZES},
    }


def main() -> None:
    arguments = parser_of(__doc__, tasks=TASKS).parse_args()
    results = {}
    for name in arguments.tasks:
        found = results[name] = compared(TASKS[name]())
        print(
            f"{name}: noise scale {found['noise_scale']:.0f} rows, an update costs as much as "
            f"{found['overhead_in_rows']:.0f} rows; predicted {found['predicted']:.0f}, best "
            f"{found['best']}, factor {found['factor']:.2f}"
        )
        print("  rows    " + "".join(f"{size:>8}" for size in SIZES))
        print("  updates " + "".join(f"{value:8.0f}" for value in found["updates"].values()))
        print("  time    " + "".join(f"{value:8.2f}" for value in found["slower"].values()))
    save(arguments.json, results)


if __name__ == "__main__":
    main()
