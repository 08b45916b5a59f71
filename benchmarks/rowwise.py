"""Time and memory of `rowwise` in PyTorch: what one more forward pass costs, and what stays flat.

A transformer of four layers embeds pairs of 32 tokens. Its loss is contrastive, over all rows: by
`rowwise`, uncut, and by cached gradients as people write them by hand (a forward pass without
gradients, the gradients of the embeddings, then a backward pass of each micro-batch against them).
The second loss is a mean over rows, which today's windows can cut: `rowwise` against `backward`.
Times are CPU seconds of one thread, as medians of ratios of neighbouring runs in one process. Peaks
are what tensors hold beside parameters, with the loss on all rows and with the loss in blocks.

Usage: python benchmarks/rowwise.py [--rounds 9] [--json FILE]
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from command import parser_of, save
from torch import nn
from torch.nn import functional

import virtualbatch.torch as vb
from virtualbatch.torch._plan.peak import peak_bytes

WIDTH, TOKENS, LAYERS, WORDS = 128, 32, 4, 2000
PAIRS, SIZE = 64, 8
# For the peaks: a smaller model, so that many micro-batches take seconds.
SMALL, FEW, BLOCK = 64, 16, 16


def embedder(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(WORDS, width), body)


def contrastive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
    return functional.cross_entropy(20 * a @ b.T, torch.arange(len(a)))


def in_blocks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    def of_rows(rows: Any, others: torch.Tensor) -> torch.Tensor:
        logits = 20 * rows[0] @ others.T
        return functional.cross_entropy(logits, rows[1], reduction="none")

    a, b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
    loss = vb.rowwise(of_rows, microbatch_size=BLOCK, check=False)
    found: torch.Tensor = loss((a, torch.arange(len(a))), b).mean()
    return found


def cached_by_hand(
    embed: Callable[[torch.Tensor], torch.Tensor], pairs: list[torch.Tensor]
) -> None:
    """The way of GradCache, https://arxiv.org/abs/2101.06983, for one encoder."""
    pieces = [ids.split(SIZE) for ids in pairs]
    with torch.no_grad():
        rows = [torch.cat([embed(piece) for piece in column]) for column in pieces]
    rows = [z.requires_grad_() for z in rows]
    contrastive(*rows).backward()
    for column, z in zip(pieces, rows, strict=True):
        if z.grad is None:
            raise ValueError("the loss uses both columns.")
        for piece, gradient in zip(column, z.grad.split(SIZE), strict=True):
            (embed(piece) * gradient).sum().backward()


def ways() -> tuple[nn.Module, dict[str, Callable[[], Any]]]:
    torch.manual_seed(0)
    model = embedder(WIDTH, LAYERS)
    pairs = [torch.randint(0, WORDS, (PAIRS, TOKENS)) for _ in range(2)]

    def embed(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(ids).mean(1)
        return found

    def mean_loss(ids: torch.Tensor) -> torch.Tensor:
        return embed(ids).square().mean()

    encode = vb.rowwise(embed, module=model, microbatch_size=SIZE, check=False)
    return model, {
        "contrastive, uncut": lambda: contrastive(*map(embed, pairs)).backward(),
        "contrastive, rowwise": lambda: contrastive(*map(encode, pairs)).backward(),
        "contrastive, cached by hand": lambda: cached_by_hand(embed, pairs),
        "mean, uncut": lambda: mean_loss(pairs[0]).backward(),
        "mean, backward": lambda: vb.backward(
            mean_loss, pairs[0], module=model, microbatch_size=SIZE, check=False
        ),
        "mean, rowwise": lambda: encode(pairs[0]).square().mean().backward(),
    }


RATIOS = [
    ("contrastive, rowwise", "contrastive, uncut"),
    ("contrastive, cached by hand", "contrastive, uncut"),
    ("contrastive, rowwise", "contrastive, cached by hand"),
    ("mean, rowwise", "mean, uncut"),
    ("mean, rowwise", "mean, backward"),
]


def times(rounds: int) -> list[dict[str, Any]]:
    model, runs = ways()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            model.zero_grad()
            start = time.process_time()
            run()
            found[name].append(time.process_time() - start)
    rows = []
    for first, second in RATIOS:
        # The first round warms up.
        ratios = [a / b for a, b in zip(found[first][1:], found[second][1:], strict=True)]
        ratio = statistics.median(ratios)
        rows.append({"way": first, "against": second, "ratio": ratio})
        print(f"{first:28} / {second:28} {ratio:.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    return rows


def peaks() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = embedder(SMALL, 2)

    def embed(batch: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        return [model(ids).mean(1) for ids in batch]

    def run(pairs: Any, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        encode = vb.rowwise(embed, module=model, microbatch_size=FEW, check=False)
        loss(*encode(pairs)).backward()

    rows = []
    for count in (4, 16, 64):
        size = count * FEW
        pairs = tuple(torch.randint(0, WORDS, (size, TOKENS)) for _ in range(2))
        # Two outputs and their gradients, which somebody must hold.
        outputs = 4 * size * SMALL * 4
        for name, loss in (("on all rows", contrastive), ("in blocks", in_blocks)):
            model.zero_grad()
            peak = peak_bytes(partial(run, pairs, loss))
            rows.append({"micro-batches": count, "loss": name, "peak": peak, "outputs": outputs})
            print(
                f"{count:3} micro-batches, loss {name:11} peak {peak / 2**20:6.2f} MiB, "
                f"without outputs and their gradients {(peak - outputs) / 2**20:6.2f} MiB"
            )
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    save(args.json, {"times": times(args.rounds), "peaks": peaks()})


if __name__ == "__main__":
    main()
