"""nanoGPT's training loop with masked targets: its inner loop of micro-steps becomes one line."""

import math

import torch
from torch import nn
from torch.nn import functional

import virtualbatch.torch as vb

WORDS, LENGTH, ROWS, STEPS, UPDATES = 64, 16, 24, 6, 8
torch.set_num_threads(1)  # so small a model gains nothing by more


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, 32), nn.Embedding(LENGTH, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.lm_head = nn.Linear(32, WORDS, bias=False)

    def forward(self, ids, targets):
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
        x = self.block(self.wte(ids) + self.wpe(torch.arange(LENGTH)), causal, is_causal=True)
        logits = self.lm_head(x).flatten(0, 1)
        return logits, functional.cross_entropy(logits, targets.flatten(), ignore_index=-1)


def train(way):
    """The weights, and the loss of the last update as the loop logs it."""
    torch.manual_seed(0)
    model, random = GPT().double(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for update in range(UPDATES):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * update / UPDATES))
        x, y = torch.randint(0, WORDS, (2, ROWS, LENGTH), generator=random)
        some = torch.rand(ROWS, LENGTH, generator=random) < torch.rand(ROWS, 1, generator=random)
        batch = x, torch.where(some, y, -1)
        if way == "ours":  # instead of the loop below
            sizes = {"accumulation_steps": STEPS, "weight": lambda b: (b[1] != -1).sum()}
            loss = vb.backward(lambda b: model(*b)[1], batch, module=model, **sizes)
        else:
            steps = STEPS if way == "nanoGPT" else 1
            for piece in zip(*(leaf.chunk(steps) for leaf in batch), strict=True):
                loss = model(*piece)[1] / steps
                loss.backward()
            loss = loss * steps
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return nn.utils.parameters_to_vector(model.parameters()).detach(), loss.item()


whole, whole_loss = train("whole")
print(f"whole batches of {ROWS}: last loss {whole_loss:.6f}")
for way, least, most in (("ours", 0, 1e-9), ("nanoGPT", 1e-2, 1)):
    weights, loss = train(way)
    off = (weights - whole).abs().max()
    print(f"{way}, {STEPS} micro-batches: last loss {loss:.6f}, weights off by {off:.0e}")
    assert least < off < most
