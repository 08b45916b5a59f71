"""How far off the noise scale is where it is known, and what its statistics cost.

Bias: the gradient of row x at parameters p is p - x, with x drawn from a normal distribution of
known variances, so the noise scale is known. Over many windows the estimate is compared with it,
for several cuts, beside what is often done instead. Cost: the time of a window with `stats=True`
over that without, in interleaved rounds, each engine in a process of its own.

Usage: python benchmarks/noise.py [--windows 10000] [--rounds 60] [--engines torch] [--json FILE]
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from command import apart, parser_of, save
from noise_costs import ENGINES, windows_of

from virtualbatch.bench.children import tell
from virtualbatch.bench.rounds import in_rounds, seconds_of

ENTRIES, SCALE = 40, 100.0
# Micro-batches of a window of 64 rows, and of one that does not divide evenly.
CUTS = {
    "8 x 8": [8] * 8,
    "2 x 32": [32] * 2,
    "7 x 8 and 4": [8] * 7 + [4],
    "1, 3, 5, 8, 15, 32": [1, 3, 5, 8, 15, 32],
}
_rng = np.random.default_rng(0)
VARIANCES = _rng.gamma(1.0, size=ENTRIES)
# So that tr(S) / |G|^2 is SCALE.
MEAN = np.full(ENTRIES, (VARIANCES.sum() / SCALE / ENTRIES) ** 0.5)


def bias(windows: int) -> dict[str, Any]:
    """Estimates by the JAX engine, for each cut: ours, and three that are often used instead."""
    import jax
    import jax.numpy as jnp

    import virtualbatch.jax as vb
    from virtualbatch import NoiseScale, WindowStats

    jax.config.update("jax_enable_x64", True)

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.sum(jnp.square(params - x), 1)) / 2

    results = {}
    for name, sizes in CUTS.items():
        edges = np.cumsum(sizes)[:-1]

        @jax.jit
        def stats_of(key: Any, edges: Any = tuple(edges), rows: int = sum(sizes)) -> Any:
            def one(key: Any) -> Any:
                noise = jax.random.normal(key, (rows, ENTRIES)) * jnp.sqrt(VARIANCES)
                window = vb.Window(jnp.split(noise, edges))
                grad = vb.value_and_grad(loss, stats=True)
                return grad(jnp.asarray(MEAN), window)[-1]

            return jax.lax.map(one, jax.random.split(key, windows))

        found = [
            np.broadcast_to(np.asarray(x, float), windows) for x in stats_of(jax.random.key(1))
        ]
        scale = NoiseScale(decay=1.0)
        for stats in zip(*found, strict=True):
            scale.update(WindowStats(*stats))
        estimate = scale.estimate()
        results[name] = {
            "ours": estimate.scale / SCALE - 1,
            "interval": [estimate.low / SCALE - 1, estimate.high / SCALE - 1],
        } | {way: scale / SCALE - 1 for way, scale in instead(*found).items()}
    return results


def instead(rows: Any, count: Any, mean_square: Any, square: Any) -> dict[str, float]:
    """Other estimates from the same windows."""
    noise = rows * (mean_square - square) / (count - 1)
    signal = square - noise / rows
    return {
        "mean of ratios": float(np.mean(noise / signal)),
        "|g|^2 taken for the signal": float(noise.mean() / square.mean()),
        "k for k - 1": float(
            np.mean(rows * (mean_square - square) / count)
            / np.mean(square - (mean_square - square) / count)
        ),
    }


def cost(engine: str, rounds: int) -> dict[str, Any]:
    """Median ratio of a window with statistics over one without, in pairs, for each model."""
    results = {}
    for name, pair in windows_of(engine).items():
        runs = {stats: partial(seconds_of, partial(twice, run)) for stats, run in pair.items()}
        times = in_rounds(runs, rounds)
        ratios = np.divide(times[True], times[False])
        quarters = statistics.quantiles(ratios, n=4)
        results[name] = {"ratio": quarters[1], "quartiles": [quarters[0], quarters[2]]}
    return results


def twice(run: Callable[[], object]) -> None:
    run()
    run()


def main() -> None:
    parser = parser_of(__doc__, windows=10_000, rounds=60, engines=ENGINES)
    arguments = parser.parse_args()
    if arguments.one:
        tell(cost(*arguments.one, arguments.rounds))
        return
    results: dict[str, Any] = {"bias": bias(arguments.windows), "cost": {}}
    print(f"Noise scale {SCALE:.0f} rows, {arguments.windows:,} windows: how far off, in percent")
    for name, found in results["bias"].items():
        low, high = found.pop("interval")
        texts = [f"{way} {100 * value:+.1f}" for way, value in found.items()]
        print(f"{name:20}{', '.join(texts)} (interval {100 * low:+.1f} to {100 * high:+.1f})")
    for engine in arguments.engines:
        framework = engine.removeprefix("keras on ")
        results["cost"][engine] = apart(engine, KERAS_BACKEND=framework)
        for name, found in results["cost"][engine].items():
            low, high = found["quartiles"]
            print(f"{engine:20}{name:12}{found['ratio']:.3f} ({low:.3f} to {high:.3f})")
    save(arguments.json, results)


if __name__ == "__main__":
    main()
