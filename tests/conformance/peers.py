"""Cases that other accumulation loops get wrong, with the figures that are due.

Most use one-hot samples and weights of 0, so that the gradient of a weight is the part of the
update that its sample or token received. The names are those of the survey of peers; F9, F12 and
R2 stand among the laws.
"""

from typing import Any

import numpy as np
from tests.oracle import assert_close

from virtualbatch.window.stream import windows
from virtualbatch.window.window import Window


def one_hot(engine: Any, samples: int) -> tuple[Any, Any]:
    """Parameters and outputs of a linear model in which sample i moves weight i alone."""

    def outputs(params: Any, rows: Any) -> Any:
        return engine.ops.sum(rows * params["weight"], -1)

    return engine.parameters({"weight": np.zeros(samples)}), outputs


def received(
    engine: Any, compiled: Any, samples: int, batch: Any = None, **options: Any
) -> list[Any]:
    """What each sample received, for a batch or for each Window in a list."""
    params, outputs = one_hot(engine, samples)
    run = engine.program(
        lambda params, rows: engine.ops.mean(outputs(params, rows)),
        params,
        compiled=compiled,
        **options,
    )
    found = batch if isinstance(batch, list) else [engine.array(np.eye(samples))]
    return [run(one).gradients["weight"] for one in found]


def stream(engine: Any, rows: int, size: int) -> list[Any]:
    """One-hot samples as a loader gives them."""
    return [engine.array(np.eye(rows)[start : start + size]) for start in range(0, rows, size)]


def f1_every_token_counts_once(engine: Any, compiled: Any) -> None:
    # Two micro-batches of 2 x 4 tokens, 7 valid and 1 valid. Peers give the lone token 4 times.
    ops = engine.ops
    params, outputs = one_hot(engine, 16)
    mask = np.ones((4, 4))
    mask[1, 3] = 0
    mask[2:] = 0
    mask[2, 2] = 1
    run = engine.program(
        lambda params, batch: (
            ops.sum(outputs(params, batch["x"]) * batch["mask"]) / ops.sum(batch["mask"])
        ),
        params,
        compiled=compiled,
        microbatch_size=2,
        weight=lambda batch: ops.sum(batch["mask"]),
    )
    batch = {"x": engine.array(np.eye(16).reshape(4, 4, 16)), "mask": engine.array(mask)}
    assert mask.sum() == 8
    assert_close(run(batch).gradients["weight"], mask.reshape(-1) * 0.125)


def f2_a_short_last_batch_is_a_window_of_its_own(engine: Any, compiled: Any) -> None:
    # 10 samples by 4, two per window. Peers carry the short batch into the next epoch.
    found = list(windows(stream(engine, 10, 4), accumulation_steps=2))
    first, second = received(engine, compiled, 10, found)
    assert_close(first, [1 / 8] * 8 + [0] * 2)
    assert_close(second, [0] * 8 + [1 / 2] * 2)


def f2_a_short_micro_batch_inside_a_window(engine: Any, compiled: Any) -> None:
    # 10 samples by 4, all in one window. Peers let samples 8 and 9 count twice.
    (found,) = windows(stream(engine, 10, 4), accumulation_steps=3)
    (weights,) = received(engine, compiled, 10, [found])
    assert_close(weights, [1 / 10] * 10)


def f3_a_trailing_window_is_neither_dropped_nor_too_small(engine: Any, compiled: Any) -> None:
    # 5 micro-batches, 4 per window. Peers never apply the fifth, or a quarter of it.
    found = list(windows(stream(engine, 10, 2), accumulation_steps=4))
    weights = received(engine, compiled, 10, found)
    assert len(weights) == 2
    assert_close(weights[1], [0] * 8 + [1 / 2] * 2)


def f4_a_term_that_is_already_a_mean_counts_once(engine: Any, compiled: Any) -> None:
    # Squared error over 7 + 1 tokens, plus the mean of v squared: due is 1 for any cut.
    ops = engine.ops
    mask = np.array([[1.0, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0]])
    tokens = np.random.default_rng(1).normal(size=(4, 3, 8))
    params = engine.parameters({"weight": np.zeros(8), "v": np.array([1.0, -1.0])})

    def loss_fn(params: Any, batch: Any) -> Any:
        errors = (ops.sum(batch["x"] * params["weight"], -1) - 1) ** 2
        return {
            "tokens": ops.sum(errors * batch["mask"]) / ops.sum(batch["mask"]),
            "v": ops.mean(params["v"] ** 2),
        }

    due = -2 * (tokens * mask[:, :, None]).sum((0, 1)) / mask.sum()
    for steps in (1, 2, 4):
        run = engine.program(
            loss_fn,
            params,
            compiled=compiled,
            accumulation_steps=steps,
            weight=lambda batch: {"tokens": ops.sum(batch["mask"]), "v": None},
        )
        gradients = run({"x": engine.array(tokens), "mask": engine.array(mask)}).gradients
        assert_close(gradients["v"], [1.0, -1.0])
        assert_close(gradients["weight"], due)


def f5_the_gradient_is_not_times_the_micro_batches(engine: Any, compiled: Any) -> None:
    # Equal batches and a mean: the ratio to the whole batch is 1, not 4.
    (weights,) = received(engine, compiled, 8, accumulation_steps=4)
    assert_close(weights, [1 / 8] * 8)


def f10_rows_of_an_embedding_are_neither_doubled_nor_lost(engine: Any, compiled: Any) -> None:
    params = engine.parameters({"table": np.zeros((3, 1))})
    run = engine.program(
        lambda params, ids: engine.ops.mean(engine.ops.take(params["table"], ids)),
        params,
        compiled=compiled,
    )
    for ids, due in (
        ([[[0]], [[0], [1]]], [2 / 3, 1 / 3, 0]),
        ([[[0, 0]], [[0, 1]]], [0.75, 0.25, 0]),
        ([[[0, 0]], [[1, 1]]], [0.5, 0.5, 0]),
    ):
        window = Window(engine.array(np.asarray(found)) for found in ids)
        assert_close(run(window).gradients["table"][:, 0], due)


def r4_fewer_micro_batches_than_asked_for_are_no_smaller_update(engine: Any, compiled: Any) -> None:
    (weights,) = received(engine, compiled, 3, accumulation_steps=4)
    assert_close(weights, [1 / 3] * 3)


def r4_each_micro_batch_has_its_own_dropout_mask(engine: Any, compiled: Any) -> None:
    ops = engine.ops
    params = engine.parameters({"weight": np.ones(64)}, "float32")

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        kept = batch * ops.cast(ops.uniform(key, (1, 64)) < 0.5, "float32")
        return ops.mean(kept * params["weight"]), kept

    run = engine.program(
        loss_fn, params, compiled=compiled, microbatch_size=1, has_aux=True, random=True
    )
    masks = run(engine.array(np.ones((4, 64)), "float32")).aux
    assert masks.shape == (4, 64)
    assert len(np.unique(masks, axis=0)) == 4


def r10_unequal_totals_of_sample_weights(engine: Any, compiled: Any) -> None:
    ops = engine.ops
    params, outputs = one_hot(engine, 4)
    run = engine.program(
        lambda params, batch: (
            ops.sum(outputs(params, batch["x"]) * batch["w"]) / ops.sum(batch["w"])
        ),
        params,
        compiled=compiled,
        microbatch_size=2,
        weight=lambda batch: ops.sum(batch["w"]),
    )
    batch = {"x": engine.array(np.eye(4)), "w": engine.array(np.array([3.0, 3, 1, 1]))}
    assert_close(run(batch).gradients["weight"], [0.375, 0.375, 0.125, 0.125])


def r10_two_outputs_with_two_masks(engine: Any, compiled: Any) -> None:
    ops = engine.ops
    masks = {"first": np.array([1.0, 0, 1, 1]), "second": np.array([1.0, 1, 1, 0])}
    params = engine.parameters({name: np.zeros(4) for name in masks})

    def loss_fn(params: Any, batch: Any) -> Any:
        return {
            name: ops.sum(ops.sum(batch["x"] * params[name], -1) * batch[name])
            / ops.sum(batch[name])
            for name in masks
        }

    run = engine.program(
        loss_fn,
        params,
        compiled=compiled,
        microbatch_size=2,
        weight=lambda batch: {name: ops.sum(batch[name]) for name in masks},
    )
    batch = {"x": np.eye(4)} | masks
    gradients = run({key: engine.array(value) for key, value in batch.items()}).gradients
    for name, mask in masks.items():
        assert_close(gradients[name], mask / 3)
