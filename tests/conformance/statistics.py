"""Laws of `stats=True`: what a window tells of its noise is what its gradients are."""

from typing import Any

import numpy as np
from tests.conformance import problems
from tests.conformance.adapters.base import leaves
from tests.conformance.laws import arrays, network, split
from tests.oracle import assert_close

CUTS = {"even": [4, 4, 4], "ragged": [4, 4, 2], "one row each": [1, 1, 1], "uneven": [1, 7, 3]}


def _squared(gradients: Any) -> Any:
    return sum((gradient**2).sum() for gradient in leaves(gradients))


def due(name: str, sizes: list[int]) -> tuple[Any, list[Any]]:
    """A batch, and the statistics of a window of it, by hand."""
    params, batch = problems.parameters(), problems.data(sum(sizes))
    stops = np.cumsum(sizes)
    parts = [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    if name == "tokens":
        # Padding may hold anything.
        batch["x"][batch["mask"] == 0] = 3.0
        weights = [batch["mask"][part].sum() for part in parts]
    elif name == "sample weights":
        weights = [batch["sample_weight"][part].sum() for part in parts]
    else:
        weights = sizes
    shares = np.array(weights) / sum(weights)
    norms = [_squared(problems.reference(name, params, batch, part)[1]) for part in parts]
    mean_square = sum(n / s for n, s in zip(norms, shares, strict=True) if s)
    square = _squared(problems.reference(name, params, batch)[1])
    return batch, [sum(sizes), (shares > 0).sum(), mean_square, square]


def statistics_are_those_of_the_gradients(engine: Any, compiled: Any, name: str, cut: str) -> None:
    sizes = CUTS[cut]
    params, loss_fn, weight = network(engine, name)
    batch, expected = due(name, sizes)
    run = engine.program(loss_fn, params, compiled=compiled, stats=True, **weight)
    result = run(split(arrays(engine, batch), sizes))
    assert_close(result.loss, problems.reference(name, problems.parameters(), batch)[0])
    for found, value in zip(result.stats, expected, strict=True):
        assert_close(found, value)


def statistics_of_any_weight_in_a_compiled_window(engine: Any, compiled: Any) -> None:
    params, loss_fn, weight = network(engine, "sample weights")
    run = engine.program(
        loss_fn, params, compiled=compiled, microbatch_size=2, stats=True, **weight
    )
    values, batch = problems.parameters(), problems.data(6)
    batch["sample_weight"] = np.array([2.0, 1.0, -1.5, -0.25, 0.5, 3.0])
    norms = [
        _squared(problems.reference("sample weights", values, batch, slice(k, k + 2))[1])
        for k in (0, 2, 4)
    ]
    shares = batch["sample_weight"].reshape(3, 2).sum(1) / batch["sample_weight"].sum()
    square = _squared(problems.reference("sample weights", values, batch)[1])
    found = run(arrays(engine, batch)).stats
    for value, due in zip(found, [6, 3, (norms / shares).sum(), square], strict=True):
        assert_close(value, due)


def statistics_of_half_precision_are_wide(engine: Any, compiled: Any) -> None:
    params = engine.parameters({"w": np.ones(())}, "bfloat16")
    run = engine.program(
        lambda params, batch: engine.ops.mean(batch * params["w"]),
        params,
        compiled=compiled,
        microbatch_size=1,
        stats=True,
    )
    # Gradients 1, 2, ..., 64: their squares and sums have more bits than bfloat16.
    x = np.arange(1.0, 65.0)
    result = run(engine.array(x, "bfloat16"))
    for found, value in zip(result.stats[:3], [64, 64, (x**2).mean()], strict=True):
        assert_close(found, value, 1e-6)


def statistics_come_after_aux(engine: Any, compiled: Any) -> None:
    params = engine.parameters({"w": np.ones(1)})

    def loss_fn(params: Any, batch: Any) -> Any:
        outputs = engine.ops.sum(batch * params["w"], -1)
        return engine.ops.mean(outputs), outputs

    run = engine.program(
        loss_fn, params, compiled=compiled, microbatch_size=1, has_aux=True, stats=True
    )
    x = np.array([[1.0], [2.0], [6.0]])
    result = run(engine.array(x))
    assert_close(result.aux, x[:, 0])
    for found, value in zip(result.stats, [3, 3, 41 / 3, 9], strict=True):
        assert_close(found, value)


def a_window_without_weight_tells_nothing(engine: Any, compiled: Any) -> None:
    params, loss_fn, weight = network(engine, "tokens")
    batch = problems.data(4)
    batch["mask"][:] = 0
    run = engine.program(
        loss_fn, params, compiled=compiled, microbatch_size=2, stats=True, **weight
    )
    assert run(arrays(engine, batch)).stats == [4, 0, 0, 0]
