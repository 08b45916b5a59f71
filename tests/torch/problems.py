"""Losses that are means over different things, with what each was divided by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

TOKENS = 3


class Problem(NamedTuple):
    """A loss to differentiate.

    Fields:
        loss_fn: batch -> loss.
        weight: micro-batch -> what that loss was divided by; None for rows.
        batch: rows -> batch.
        module: what to differentiate with respect to.
        summands: numbers that meet in one entry of a gradient, per row.
    """

    loss_fn: Callable[[Any], Any]
    weight: Callable[[Any], Any] | None
    batch: Callable[[int], Any]
    module: torch.nn.Module
    summands: int


class Model(torch.nn.Module):
    """A small network with one output per token."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        random = np.random.default_rng(7)
        for name, shape in {"kernel": (2, 4), "bias": (4,), "head": (4, 1), "scale": ()}.items():
            value = torch.as_tensor(random.normal(size=shape), dtype=dtype)
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, x: Any) -> Any:
        return (torch.tanh(x @ self.kernel + self.bias) @ self.head)[..., 0] * self.scale


def problem(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    """One of the problems in `NAMES`, with a fresh module."""
    model = Model(dtype)

    def errors(batch: Any) -> Any:
        """Squared errors, one per token."""
        return (model(batch["x"]) - batch["y"]) ** 2

    def batch(rows: int) -> dict[str, Any]:
        random = np.random.default_rng(rows)
        data = {
            "x": random.normal(size=(rows, TOKENS, 2)),
            "y": random.normal(size=(rows, TOKENS)),
            # Some rows have no token at all, as padding at the end of an epoch.
            "mask": (random.uniform(size=(rows, TOKENS)) < 0.6)
            & (np.arange(rows) % 3 > 0)[:, None],
            "sample_weight": random.integers(0, 4, size=rows) * (np.arange(rows) != 0) + 0.25,
        }
        return {key: torch.as_tensor(value, dtype=dtype) for key, value in data.items()}

    def rows_loss(batch: Any) -> Any:
        return errors(batch).mean()

    def tokens_loss(batch: Any) -> Any:
        return (errors(batch) * batch["mask"]).sum() / batch["mask"].sum()

    def weighted_loss(batch: Any) -> Any:
        total = (errors(batch).mean(1) * batch["sample_weight"]).sum()
        return total / batch["sample_weight"].sum()

    def terms_loss(batch: Any) -> Any:
        return {"tokens": tokens_loss(batch), "weighted": weighted_loss(batch)}

    def penalty() -> Any:
        return 0.1 * sum((parameter**2).sum() for parameter in model.parameters())

    def regularised_loss(batch: Any) -> Any:
        return {"tokens": tokens_loss(batch), "penalty": penalty()}

    def rows_terms_loss(batch: Any) -> Any:
        return {"rows": rows_loss(batch), "penalty": penalty()}

    def tokens(batch: Any) -> Any:
        return batch["mask"].sum()

    def sample_weights(batch: Any) -> Any:
        return batch["sample_weight"].sum()

    def both(batch: Any) -> Any:
        return {"weighted": sample_weights(batch), "tokens": tokens(batch)}

    def tokens_and_none(batch: Any) -> Any:
        return {"tokens": tokens(batch), "penalty": None}

    loss_fn, weight = {
        "rows": (rows_loss, None),
        "tokens": (tokens_loss, tokens),
        "sample weights": (weighted_loss, sample_weights),
        "terms": (terms_loss, both),
        "terms with None": (regularised_loss, tokens_and_none),
        "terms by rows": (rows_terms_loss, None),
    }[name]
    return Problem(loss_fn, weight, batch, model, TOKENS * 16)


NAMES = ["rows", "tokens", "sample weights", "terms", "terms with None", "terms by rows"]


def uncut(loss_fn: Callable[[Any], Any], batch: Any, module: torch.nn.Module) -> tuple[Any, Any]:
    """Loss and gradients of the whole batch as NumPy arrays; a dict of terms is summed."""
    module.zero_grad()
    loss = loss_fn(batch)
    loss = sum(loss.values()) if isinstance(loss, dict) else loss
    loss.backward()
    gradients = taken(module)
    return loss.detach().numpy(), gradients


def taken(module: torch.nn.Module) -> list[Any]:
    """The gradients of a module as dense float64 arrays and Nones; `.grad` is None afterwards."""
    found = [
        None if p.grad is None else p.grad.to_dense().double().numpy() for p in module.parameters()
    ]
    module.zero_grad()
    return found
