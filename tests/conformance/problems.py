"""Losses that are means over different things, written once, with their gradients by hand.

A problem is a sum over tokens c * e, where c is what one token counts in the whole batch. The
reference works in float64 with NumPy, on the numbers that an engine was given.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

TOKENS = 3
NAMES = ["rows", "tokens", "sample weights", "terms", "sum", "a sum among terms"]
# Numbers that meet in one entry of a gradient, per row: tokens times entries of a layer.
SUMMANDS = TOKENS * 16
PENALTY = 0.125


class Problem(NamedTuple):
    """A loss to differentiate.

    Fields:
        loss_fn: (params, batch) -> loss, in the operations of an engine.
        weight: micro-batch -> what that loss was divided by; "sum" for a sum; None for rows.
    """

    loss_fn: Callable[[Any, Any], Any]
    weight: Callable[[Any], Any] | str | None


def parameters() -> dict[str, Any]:
    random = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"kernel": (2, 4), "bias": (4,), "head": (4,), "scale": ()}
    return {name: np.asarray(random.normal(size=shape)) for name, shape in shapes.items()}


def data(rows: int) -> dict[str, Any]:
    random = np.random.default_rng(rows)
    row = np.arange(rows)
    # Some rows have no token at all, as padding at the end of an epoch.
    mask = (random.uniform(size=(rows, TOKENS)) < 0.6) & (row % 3 > 0)[:, None]
    mask[-1, 0] = True
    return {
        "x": random.normal(size=(rows, TOKENS, 2)),
        "y": random.normal(size=(rows, TOKENS)),
        "mask": mask.astype(np.float64),
        "sample_weight": random.integers(0, 4, size=rows) * (row > 0) + 0.25,
    }


def network(ops: Any) -> Callable[[Any, Any], Any]:
    """Squared errors of a small network, one per token."""

    def errors(params: Any, batch: Any) -> Any:
        hidden = ops.tanh(batch["x"] @ params["kernel"] + params["bias"])
        return (ops.sum(hidden * params["head"], -1) * params["scale"] - batch["y"]) ** 2

    return errors


def problem(name: str, ops: Any, errors: Callable[[Any, Any], Any]) -> Problem:
    """A problem by its name, in the operations of an engine.

    Args:
        name: one of `NAMES`, or "terms by rows".
        ops: operations of the engine.
        errors: (params, batch) -> one number per token.
    """

    def rows(params: Any, batch: Any) -> Any:
        return ops.mean(errors(params, batch))

    def tokens(params: Any, batch: Any) -> Any:
        return ops.sum(errors(params, batch) * batch["mask"]) / ops.sum(batch["mask"])

    def weighted(params: Any, batch: Any) -> Any:
        per_row = ops.mean(errors(params, batch), 1)
        return ops.sum(per_row * batch["sample_weight"]) / ops.sum(batch["sample_weight"])

    def penalty(params: Any) -> Any:
        return PENALTY * sum(ops.sum(value**2) for value in params.values())

    def terms(params: Any, batch: Any) -> Any:
        return {
            "tokens": tokens(params, batch),
            "weighted": weighted(params, batch),
            "penalty": penalty(params),
        }

    def terms_by_rows(params: Any, batch: Any) -> Any:
        return {"rows": rows(params, batch), "penalty": penalty(params)}

    def summed(params: Any, batch: Any) -> Any:
        return ops.sum(errors(params, batch))

    def a_sum_among_terms(params: Any, batch: Any) -> Any:
        return {
            "summed": summed(params, batch),
            "tokens": tokens(params, batch),
            "penalty": penalty(params),
        }

    def mask(batch: Any) -> Any:
        return ops.sum(batch["mask"])

    def sample_weight(batch: Any) -> Any:
        return ops.sum(batch["sample_weight"])

    def both(batch: Any) -> Any:
        # In another order than the terms of the loss.
        return {"weighted": sample_weight(batch), "penalty": None, "tokens": mask(batch)}

    def of_tokens(batch: Any) -> Any:
        return {"tokens": mask(batch), "penalty": None, "summed": "sum"}

    return {
        "rows": Problem(rows, None),
        "tokens": Problem(tokens, mask),
        "sample weights": Problem(weighted, sample_weight),
        "terms": Problem(terms, both),
        "terms by rows": Problem(terms_by_rows, None),
        "sum": Problem(summed, "sum"),
        "a sum among terms": Problem(a_sum_among_terms, of_tokens),
    }[name]


def counts(name: str, batch: Any) -> Any:
    """What every token counts in the mean of the whole batch; shape (rows, tokens)."""
    rows, tokens = batch["mask"].shape
    by_rows = np.full((rows, tokens), 1 / (rows * tokens))
    by_tokens = batch["mask"] / batch["mask"].sum()
    share = batch["sample_weight"] / batch["sample_weight"].sum()
    by_weight = np.repeat(share[:, None] / tokens, tokens, 1)
    return {
        "rows": by_rows,
        "tokens": by_tokens,
        "sample weights": by_weight,
        "terms": by_tokens + by_weight,
        "terms by rows": by_rows,
        "sum": np.ones((rows, tokens)),
        "a sum among terms": 1 + by_tokens,
    }[name]


def reference(
    name: str, params: Any, batch: Any, part: slice = slice(None)
) -> tuple[Any, dict[str, Any]]:
    """Loss and gradients of the whole batch for the small network, in float64.

    Args:
        name: of the problem.
        params: parameters.
        batch: the whole batch.
        part: rows whose part of the two is asked for.
    """
    x, every = batch["x"], counts(name, batch)
    count = np.zeros_like(every)
    count[part] = every[part]
    hidden = np.tanh(x @ params["kernel"] + params["bias"])
    inner = hidden @ params["head"]
    error = inner * params["scale"] - batch["y"]
    d_output = 2 * count * error
    d_hidden = (d_output * params["scale"])[..., None] * params["head"] * (1 - hidden**2)
    gradients = {
        "kernel": np.einsum("rti,rtj->ij", x, d_hidden),
        "bias": d_hidden.sum((0, 1)),
        "head": np.einsum("rt,rtj->j", d_output * params["scale"], hidden),
        "scale": (d_output * inner).sum(),
    }
    # What does not depend on the rows is spread over them.
    penalty = PENALTY * len(x[part]) / len(x)
    return _penalised(name, params, (count * error**2).sum(), gradients, penalty)


def _penalised(
    name: str, params: Any, loss: Any, gradients: Any, penalty: float = PENALTY
) -> tuple[Any, dict[str, Any]]:
    if "terms" not in name:
        return loss, gradients
    loss += penalty * sum((value**2).sum() for value in params.values())
    return loss, {key: found + 2 * penalty * params[key] for key, found in gradients.items()}


# Half precision: whatever a micro-batch computes here is exact in 8 bits, because it is made of
# small integers and every micro-batch divides by a power of two. What is left to see is how the
# engine scales and adds.

EXACT_PARAMETERS = {"weight": np.array([1.0, -0.5, 2.0])}


def linear(ops: Any) -> Callable[[Any, Any], Any]:
    """Outputs of a linear layer, one per token."""
    return lambda params, batch: ops.sum(batch["x"] * params["weight"], -1)


def exact_data(sizes: Sequence[int]) -> dict[str, Any]:
    """A batch whose micro-batches of these sizes, powers of two, weigh powers of two each."""
    rows = sum(sizes)
    mask, sample_weight = np.zeros((rows, 2)), np.zeros(rows)
    start = 0
    for index, size in enumerate(sizes):
        # 2, 1 (so that shares are thirds), then 1 again; one token in the first row of each.
        mask[start, :] = 1 if index == 0 else [1, 0]
        sample_weight[start : start + size] = (2.0 if index == 0 else 1.0) / size
        start += size
    x = np.random.default_rng(3).integers(-1, 3, size=(rows, 2, 3)).astype(np.float64)
    return {"x": x, "mask": mask, "sample_weight": sample_weight}


def exact_reference(name: str, params: Any, batch: Any) -> tuple[Any, dict[str, Any], Any]:
    """Loss and gradients of the linear layer, and the sum of the sizes of what is added up."""
    count = counts(name, batch)
    gradients = {"weight": np.einsum("rt,rti->i", count, batch["x"])}
    loss, gradients = _penalised(
        name, params, (count * (batch["x"] @ params["weight"])).sum(), gradients
    )
    return loss, gradients, np.einsum("rt,rti->i", count, np.abs(batch["x"])).max() + 1
