"""The models of a comparison in PyTorch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from virtualbatch.bench.case import CLASSES, EPSILON, RATE, SHARPNESS, WORDS, Case


class Attention(nn.Module):
    """Attention with four heads, and a perceptron. Each adds its output to its input."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens in, tokens out."""
        q, k, v = (
            layer(x).unflatten(-1, (4, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x), approximate="tanh"))


class _Transformer(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(Attention(width), Attention(width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self[1](self[0](x)).mean(1))


def _mlp(width: int) -> nn.Module:
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def _cnn(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(2 * width * 36, CLASSES),
    )


def _tokens(width: int) -> nn.Module:
    layers = [nn.Embedding(WORDS, width), nn.Linear(width, 4 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4 * width, CLASSES))


_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "MLP": _mlp,
    "CNN": _cnn,
    "transformer": _Transformer,
    "tokens": _tokens,
    "pairs": _Transformer,
}


class Problem(NamedTuple):
    """A model with its optimizer, a batch and its cut.

    Fields:
        model: the model.
        optimizer: the optimizer of its parameters.
        batch: inputs and classes.
        pieces: the batch, cut into micro-batches.
        loss: (module, or a function in its place; batch) -> mean loss of the batch.
        weight: batch -> what its mean loss was divided by; None for the number of rows.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[torch.Tensor, torch.Tensor]
    pieces: list[tuple[torch.Tensor, torch.Tensor]]
    loss: Callable[[Any, Any], torch.Tensor]
    weight: Callable[[Any], Any] | None


def problem(case: Case, device: str = "cpu") -> Problem:
    """The problem of a case. Every call gives the same weights."""
    torch.manual_seed(0)
    model = _MODELS[case.model](case.width).to(device)
    x, y = (torch.as_tensor(leaf, device=device) for leaf in case.batch())
    # PyTorch expects the channels before the image axes.
    batch = x.movedim(-1, 1).contiguous() if case.model == "CNN" else x, y
    pieces = list(zip(*(leaf.split(case.microbatch_size) for leaf in batch), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), RATE, eps=EPSILON)
    if case.model == "tokens":
        return Problem(model, optimizer, batch, pieces, _token_loss, valid_tokens)
    loss = _contrastive_loss if case.model == "pairs" else _row_loss
    return Problem(model, optimizer, batch, pieces, loss, None)


def valid_tokens(batch: Any) -> torch.Tensor:
    """The number of tokens of a batch that are not padding."""
    return (batch[0] != 0).sum()


def token_sum(model: nn.Module, batch: Any) -> torch.Tensor:
    """The sum of the losses of all valid tokens."""
    x, y = batch
    losses = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
    return (losses * (x.flatten() != 0)).sum()


def _token_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return token_sum(model, batch) / valid_tokens(batch)


def _contrastive_loss(encode: Any, batch: Any) -> torch.Tensor:
    first, second = (nn.functional.normalize(encode(view), dim=1) for view in batch)
    logits = SHARPNESS * first @ second.T
    return nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _row_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)
