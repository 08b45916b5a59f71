"""What the JAX engine costs beside a scan written by hand, and beside optax's accumulation.

One update of Adam on 8 micro-batches of 32, in turns in one process: our call; `lax.scan` written
by hand (a mean of equal means); `optax.MultiSteps`, called once per micro-batch as its users do;
`optax.microbatching`; and the whole batch. All are jitted, with parameters and optimizer state
donated. Then the temporary memory that XLA plans for 4 and for 64 micro-batches.

Usage: python benchmarks/jax_loop.py [--models MLP CNN] [--rounds 200] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from optax import microbatching

import virtualbatch.jax as vb

MICROBATCH_SIZE, ACCUMULATION_STEPS = 32, 8


def dense(random: np.random.Generator, *sizes: int) -> dict[str, jax.Array]:
    weights = random.normal(size=sizes) / np.sqrt(np.prod(sizes[:-1]))
    return {"w": jnp.asarray(weights, jnp.float32), "b": jnp.zeros(sizes[-1])}


def mlp(random: np.random.Generator) -> tuple[Any, Callable[..., Any], tuple[int, ...]]:
    """Three small dense layers on 64 features: the time is mostly overhead."""
    params = [dense(random, 64, 128), dense(random, 128, 128), dense(random, 128, 10)]

    def logits(params: Any, x: Any) -> Any:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return params, logits, (64,)


def transformer(random: np.random.Generator) -> tuple[Any, Callable[..., Any], tuple[int, ...]]:
    """Two blocks of attention on 32 tokens of 64 features: the time is mostly arithmetic."""
    names = ("q", "k", "v", "o")
    blocks = [
        {name: dense(random, 64, 64) for name in names}
        | {"up": dense(random, 64, 256), "down": dense(random, 256, 64)}
        for _ in range(2)
    ]
    params = {"blocks": blocks, "head": dense(random, 64, 10)}

    def apply(layer: Any, x: Any) -> Any:
        return x @ layer["w"] + layer["b"]

    def logits(params: Any, x: Any) -> Any:
        for block in params["blocks"]:
            q, k, v = (apply(block[name], x).reshape(*x.shape[:2], 4, 16) for name in "qkv")
            attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
            x = x + apply(block["o"], attended)
            x = x + apply(block["down"], jax.nn.gelu(apply(block["up"], x)))
        return apply(params["head"], x.mean(1))

    return params, logits, (32, 64)


def cnn(random: np.random.Generator) -> tuple[Any, Callable[..., Any], tuple[int, ...]]:
    """Three small convolutions on 16 x 16 images: XLA on CPU is slow where they are in a loop."""

    def kernel(*sizes: int) -> jax.Array:
        return jnp.asarray(random.normal(size=sizes) / np.sqrt(np.prod(sizes[:-1])), jnp.float32)

    params = {
        "kernels": [kernel(3, 3, 1, 16), kernel(3, 3, 16, 32), kernel(3, 3, 32, 32)],
        "head": dense(random, 8 * 8 * 32, 10),
    }

    def logits(params: Any, x: Any) -> Any:
        for k, found in enumerate(params["kernels"]):
            numbers = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, found, (1, 1), "SAME", dimension_numbers=numbers)
            x = jax.nn.relu(x)
            if k == 1:
                x = x.reshape(-1, 8, 2, 8, 2, 32).mean((2, 4))
        return x.reshape(len(x), -1) @ params["head"]["w"] + params["head"]["b"]

    return params, logits, (16, 16, 1)


MODELS = {"MLP": mlp, "transformer": transformer, "CNN": cnn}


class Problem:
    """A model, its loss and one batch."""

    def __init__(self, name: str, steps: int = ACCUMULATION_STEPS):
        random = np.random.default_rng(0)
        self.params, logits, shape = MODELS[name](random)
        rows = MICROBATCH_SIZE * steps
        self.batch = (
            jnp.asarray(random.normal(size=(rows, *shape)), jnp.float32),
            jnp.asarray(random.integers(0, 10, rows)),
        )
        self.optimizer = optax.adam(1e-3)

        def loss_fn(params: Any, batch: Any) -> Any:
            found = optax.softmax_cross_entropy_with_integer_labels(
                logits(params, batch[0]), batch[1]
            )
            return found.mean()

        self.loss_fn = loss_fn

    def update(self, gradients: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        """A jitted update from a function (params, batch) -> (loss, gradients)."""

        def run(params: Any, state: Any, batch: Any) -> Any:
            loss, found = gradients(params, batch)
            changes, state = self.optimizer.update(found, state, params)
            return optax.apply_updates(params, changes), state, loss

        return jax.jit(run, donate_argnums=(0, 1))

    def by_hand(self, params: Any, batch: Any) -> Any:
        """The scan that one would write: equal micro-batches, summed, divided once."""
        cut = jax.tree.map(lambda x: x.reshape(-1, MICROBATCH_SIZE, *x.shape[1:]), batch)
        steps = len(cut[0])

        def body(total: Any, microbatch: Any) -> Any:
            found = jax.value_and_grad(self.loss_fn)(params, microbatch)
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = lax.scan(body, zero, cut)
        return jax.tree.map(lambda x: x / steps, total)

    def ours(self, params: Any, batch: Any) -> Any:
        return vb.value_and_grad(self.loss_fn, microbatch_size=MICROBATCH_SIZE)(params, batch)

    def optax_microbatching(self, params: Any, batch: Any) -> Any:
        return microbatching.microbatch(
            jax.value_and_grad(self.loss_fn),
            argnums=1,
            microbatch_size=MICROBATCH_SIZE,
            accumulator=microbatching.AccumulationType.MEAN,
        )(params, batch)

    def whole(self, params: Any, batch: Any) -> Any:
        return jax.value_and_grad(self.loss_fn)(params, batch)


class Way:
    """A way to do one update on the whole batch, with the state that it goes on from."""

    def __init__(self, problem: Problem, gradients: Callable[[Any, Any], Any]):
        self._run = problem.update(gradients)
        self._batch = problem.batch
        self.params = jax.tree.map(jnp.copy, problem.params)
        self._state = problem.optimizer.init(self.params)

    def __call__(self) -> None:
        self.params, self._state, loss = self._run(self.params, self._state, self._batch)
        loss.block_until_ready()


class MultiSteps(Way):
    """The optimizer that counts micro-batches, called once for each."""

    def __init__(self, problem: Problem):
        problem.optimizer = optax.MultiSteps(optax.adam(1e-3), ACCUMULATION_STEPS)
        super().__init__(problem, problem.whole)
        x, y = problem.batch
        size = MICROBATCH_SIZE
        # Cut beforehand, as a loader that gives micro-batches would.
        self._cut = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]

    def __call__(self) -> None:
        for microbatch in self._cut:
            self.params, self._state, loss = self._run(self.params, self._state, microbatch)
        loss.block_until_ready()


def ways(name: str) -> dict[str, Way]:
    problem = Problem(name)
    return {
        "virtualbatch": Way(problem, problem.ours),
        "scan by hand": Way(problem, problem.by_hand),
        "optax.microbatching": Way(problem, problem.optax_microbatching),
        "whole batch at once": Way(problem, problem.whole),
        "optax.MultiSteps": MultiSteps(Problem(name)),
    }


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each way, and the median ratio of each to ours."""
    runs = ways(name)
    for _ in range(5):
        for run in runs.values():
            run()
    weights = {label: jax.tree.leaves(run.params)[0] for label, run in runs.items()}
    for label, found in weights.items():
        off = float(jnp.abs(found - weights["whole batch at once"]).max())
        if off > 1e-4:
            raise AssertionError(f"{label} trains to other weights, off by {off}")
    times: dict[str, list[float]] = {label: [] for label in runs}
    for turn in range(rounds):
        # Whoever comes first in a round may find other caches.
        for label in sorted(runs, reverse=bool(turn % 2)):
            start = time.perf_counter()
            runs[label]()
            times[label].append((time.perf_counter() - start) * 1e3)
    return {
        "ms": {label: float(np.median(found)) for label, found in times.items()},
        "ratio": {
            label: float(np.median(np.divide(found, times["virtualbatch"])))
            for label, found in times.items()
        },
    }


def temporary_memory(name: str) -> dict[str, int]:
    """Bytes that XLA plans beside arguments and results, by the number of micro-batches."""
    result = {}
    for steps in (4, 64):
        problem = Problem(name, steps)
        for label, gradients in (("virtualbatch", problem.ours), ("whole batch", problem.whole)):
            compiled = jax.jit(gradients).lower(problem.params, problem.batch).compile()
            result[f"{label}, {steps}"] = compiled.memory_analysis().temp_size_in_bytes
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = {}
    for name in arguments.models:
        found = measure(name, arguments.rounds)
        found["temporary bytes"] = temporary_memory(name)
        result[name] = found
        print(f"\n{name}: {ACCUMULATION_STEPS} micro-batches of {MICROBATCH_SIZE}")
        for label, milliseconds in found["ms"].items():
            print(f"{label:20} {milliseconds:8.2f} ms, {found['ratio'][label]:6.3f} of ours")
        for label, size in found["temporary bytes"].items():
            print(f"temporary memory, {label:20} {size:12,} bytes")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
