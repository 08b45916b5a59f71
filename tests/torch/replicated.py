"""Small problems for several ranks, with what one process finds on the uncut batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb

ROWS = 24


def by_backward(loss_fn: Callable[[Any], Any], batch: Any, **options: Any) -> torch.Tensor:
    return vb.backward(loss_fn, batch, **options)


def by_loss(loss_fn: Callable[[Any], Any], batch: Any, **options: Any) -> torch.Tensor:
    loss = vb.loss(loss_fn, batch, **options)
    loss.backward()
    return loss.detach()


def overlapped(loss_fn: Callable[[Any], Any], batch: Any, **options: Any) -> torch.Tensor:
    return vb.backward(loss_fn, batch, reduce="overlapped", **options)


# All are the same law, so every case of a law is tried with each.
VERBS = {"backward": by_backward, "loss": by_loss, "overlapped": overlapped}


def column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1)


def scalar() -> DistributedDataParallel:
    """One parameter w = 1; its output is w x."""
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(module.weight)
    return DistributedDataParallel(module)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)).double()


def with_batchnorm() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 6)
    return nn.Sequential(*layers).double()


def rows(start: int, stop: int) -> dict[str, torch.Tensor]:
    """Some of the 24 rows that all ranks share."""
    made = torch.Generator().manual_seed(3)
    whole = {
        "x": torch.randn(ROWS, 6, dtype=torch.float64, generator=made),
        "y": torch.randn(ROWS, 6, dtype=torch.float64, generator=made),
        "a": (torch.rand(ROWS, 6, generator=made) < 0.3).double(),
        "b": torch.rand(ROWS, dtype=torch.float64, generator=made).square(),
    }
    # The first rows, which are a rank's only ones in some cuts, have no token.
    whole["a"][:5] = 0
    return {name: leaf[start:stop] for name, leaf in whole.items()}


def terms_of(net: Any, inner: nn.Module) -> Callable[[Any], dict[str, torch.Tensor]]:
    """Masked tokens, weighted rows and a penalty, each a mean of its own."""

    def terms(batch: Any) -> dict[str, torch.Tensor]:
        off = (net(batch["x"]) - batch["y"]).square()
        tokens, weights = batch["a"].sum(), batch["b"].sum()
        return {
            "tokens": (off * batch["a"]).sum() / tokens,
            "rows": (off.mean(1) * batch["b"]).sum() / weights,
            "penalty": 0.1 * sum(p.square().sum() for p in inner.parameters()),
        }

    return terms


def weight(batch: Any) -> dict[str, Any]:
    return {"tokens": batch["a"].sum(), "rows": batch["b"].sum(), "penalty": None}


def mse_of(net: Any) -> Callable[[Any], torch.Tensor]:
    return lambda batch: (net(batch["x"]) - batch["y"]).square().mean()


def uncut(
    module: nn.Module,
    loss_of: Callable[[nn.Module], Callable[[Any], Any]],
    batch: Any | None = None,
) -> tuple[float, list[Any]]:
    """Loss and gradients of all rows in one process, by PyTorch alone."""
    loss = loss_of(module)(rows(0, ROWS) if batch is None else batch)
    loss = sum(loss.values()) if isinstance(loss, Mapping) else loss
    loss.backward()
    return float(loss.detach()), gradients(module)


def gradients(module: nn.Module) -> list[Any]:
    """Dense float64 arrays, and None where there is none."""
    return [
        None if p.grad is None else p.grad.to_dense().double().numpy().copy()
        for p in module.parameters()
    ]
