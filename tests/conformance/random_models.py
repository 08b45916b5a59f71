"""Models, losses and cuts that are drawn at random, each against its own uncut batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
from tests.conformance.adapters.base import leaves
from tests.conformance.laws import arrays, split
from tests.oracle import assert_all_close, assert_close

# Which are drawn in which mode: a compiled program takes seconds, and an eager one none.
SEEDS = {False: range(80), True: range(80, 100)}


def random_models_equal_their_uncut_batch(engine: Any, compiled: Any) -> None:
    for seed in SEEDS[compiled]:
        random = np.random.default_rng(seed)
        values, outputs = _network(engine.ops, random)
        loss_fn, weight = _loss(engine.ops, random, outputs)
        params = engine.parameters(values)
        batch = _data(random)
        due = engine.plain(loss_fn, params, arrays(engine, batch))
        cut, options = _cut(random, arrays(engine, batch))
        options |= {"weight": weight} if weight else {}
        result = engine.program(loss_fn, params, compiled=compiled, **options)(cut)
        try:
            assert_close(result.loss, due.loss)
            assert_all_close(leaves(result.gradients), leaves(due.gradients))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def _data(random: Any) -> Any:
    """Rows of three tokens in a structure of dicts, lists and tuples; never all of them masked."""
    rows = int(random.integers(1, 13))
    mask = random.uniform(size=(rows, 3)) < random.choice([0.2, 0.5, 0.9])
    mask[random.integers(rows), 0] = True
    weight = random.integers(0, 3, size=rows).astype(np.float64)
    weight[random.integers(rows)] = 1.5
    return {
        "inputs": [random.normal(size=(rows, 3, 4)), (random.normal(size=(rows, 3)),)],
        "mask": mask.astype(np.float64),
        "weight": weight,
    }


def _cut(random: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """A batch or a Window of it, and the size to give with it."""
    rows = int(leaves(batch)[0].shape[0])
    kind = random.choice(["size", "steps", "window"])
    if kind == "window":
        stops = [*np.flatnonzero(random.uniform(size=rows - 1) < 0.4) + 1, rows]
        return split(batch, np.diff([0, *stops])), {}
    name = {"size": "microbatch_size", "steps": "accumulation_steps"}[kind]
    return batch, {name: int(random.integers(1, rows + 3))}


def _network(ops: Any, random: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Parameters, and (params, batch) -> one output per token."""
    depth = int(random.integers(1, 4))
    values: dict[str, Any] = {
        "layers": [(random.normal(size=(4, 4)) / 2, random.normal(size=4)) for _ in range(depth)],
        "head": random.normal(size=4),
        "scale": np.asarray(random.normal()),
        "unused": random.normal(size=2),
    }
    # A layer that is used again is tied; one that nothing uses gets no gradient, or zeros.
    order = [int(random.integers(depth)) for _ in range(depth + 1)]
    kinds = [str(random.choice(["tanh", "square", "residual"])) for _ in order]

    def outputs(params: Any, batch: Any) -> Any:
        x = batch["inputs"][0]
        for index, kind in zip(order, kinds, strict=True):
            kernel, bias = params["layers"][index]
            found = ops.tanh(x @ kernel + bias)
            x = {"tanh": found, "square": found * found, "residual": x + found}[kind]
        return ops.sum(x * params["head"], -1) * params["scale"]

    return values, outputs


def _loss(
    ops: Any, random: Any, outputs: Callable[[Any, Any], Any]
) -> tuple[Callable[[Any, Any], Any], Callable[[Any], Any] | None]:
    """A loss of one term or of several, and the weight that belongs to it."""

    def errors(params: Any, batch: Any) -> Any:
        return (outputs(params, batch) - batch["inputs"][1][0]) ** 2

    def penalty(params: Any) -> Any:
        return 0.1 * sum(ops.sum(x * x) for x in (*params["layers"][0], params["head"]))

    means: dict[str, Callable[[Any, Any], Any]] = {
        "rows": lambda params, batch: ops.mean(errors(params, batch)),
        "tokens": lambda params, batch: (
            ops.sum(errors(params, batch) * batch["mask"]) / ops.sum(batch["mask"])
        ),
        "weighted": lambda params, batch: (
            ops.sum(ops.mean(errors(params, batch), 1) * batch["weight"]) / ops.sum(batch["weight"])
        ),
        "penalty": lambda params, batch: penalty(params),
    }
    weights: dict[str, Callable[[Any], Any]] = {
        "rows": lambda batch: batch["mask"].shape[0],
        "tokens": lambda batch: ops.sum(batch["mask"]),
        "weighted": lambda batch: ops.sum(batch["weight"]),
        "penalty": lambda batch: None,
    }
    first = str(random.choice(["rows", "tokens", "weighted"]))
    if random.uniform() < 0.4:
        return means[first], None if first == "rows" else weights[first]
    names = sorted({first, *random.choice(list(means), size=2)})
    return (
        lambda params, batch: {name: means[name](params, batch) for name in names},
        lambda batch: {name: weights[name](batch) for name in names},
    )
