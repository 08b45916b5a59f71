"""Small fully sharded models whose terms need all their parts, and what they find together."""

from collections.abc import Callable
from typing import Any

import torch
from tests.torch.replicated import rows
from torch import nn
from torch.distributed.fsdp import fully_shard

import virtualbatch.torch as vb


class Block(nn.Module):
    """A layer that gives the squares of its parameters beside its output."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor, penalty: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.down(torch.tanh(self.up(x)))
        return out, penalty + sum(p.square().sum() for p in self.parameters())


class Net(nn.Module):
    """Blocks with one head for tokens and one for rows."""

    def __init__(self, blocks: int = 2):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.tokens, self.rows = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        penalty = 0.0
        for block in self.blocks:
            x, penalty = block(x, penalty)
        return self.tokens(x), self.rows(x), penalty


def net() -> Net:
    return Net().double()


def sharded(module: nn.Module | None = None, **options: Any) -> Any:
    """A network of which blocks and heads are gathered one at a time."""
    module = net() if module is None else module
    for child in (*module.blocks, module.tokens, module.rows):
        fully_shard(child, **options)
    return fully_shard(module, **options)


def terms_of(module: nn.Module) -> Callable[[Any], dict[str, torch.Tensor]]:
    """Masked tokens, weighted rows and a penalty, each a mean of its own.

    Where a micro-batch has no token, or no weight, loss and gradient of that term are NaN.
    """

    def terms(batch: Any) -> dict[str, torch.Tensor]:
        tokens, by_row, penalty = module(batch["x"])
        off, of_row = (tokens - batch["y"]).square(), (by_row - batch["y"]).square().mean(1)
        return {
            "tokens": (off * batch["a"]).sum() / batch["a"].sum(),
            "rows": (of_row * batch["b"]).sum() / batch["b"].sum(),
            "penalty": 0.1 * penalty,
        }

    return terms


def mse_of(module: nn.Module) -> Callable[[Any], torch.Tensor]:
    def mse(batch: Any) -> torch.Tensor:
        tokens, by_row, _ = module(batch["x"])
        return (tokens + by_row - batch["y"]).square().mean()

    return mse


def full(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def full_gradients(module: nn.Module) -> list[Any]:
    """Gradients as arrays, gathered; called on all ranks at once."""
    found = [None if p.grad is None else full(p.grad) for p in module.parameters()]
    return [None if x is None else x.double().numpy().copy() for x in found]


def steps(module: nn.Module, start: int, stop: int, **options: Any) -> torch.Tensor:
    """`backward` of the mean squared error of some rows."""
    batch = rows(start, stop)
    return vb.backward(mse_of(module), batch, module=module, **({"microbatch_size": 4} | options))
