"""A language model on masked labels, and what PyTorch alone trains of it on whole batches.

46 rows in updates of 20, 20 and 6, twice, by AdamW with clipping and a schedule.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

WORDS, LENGTH, ROWS, BATCH, EPOCHS = 40, 9, 46, 20, 2
RATE, DECAY, CLIP = 0.01, 0.9, 1.0
# A mean of means is off by more than this of the way that the weights go.
WRONG = 0.1


class Net(nn.Module):
    """Words in, logits of words out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.hidden = nn.Embedding(WORDS, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, WORDS)

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.table(ids))))


def data(rows=ROWS):
    """Ids and labels; of each row another part counts, of its first word always."""
    made = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, WORDS, (ROWS, LENGTH), generator=made) for _ in range(2))
    counts = torch.rand(ROWS, LENGTH, generator=made) < torch.rand(ROWS, 1, generator=made)
    counts[:, 0] = True
    return Subset(TensorDataset(ids, torch.where(counts, labels, -100)), range(rows))


def loss_of(model):
    """batch -> the mean loss of the labels that count."""
    return lambda batch: cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def labels(batch):
    """How many labels count."""
    return (batch[1] != -100).sum()


def optimizer_and_schedule(model):
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, DECAY)


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


class Trained(NamedTuple):
    """What a loop left.

    Fields:
        weights: of the model, one after another.
        norms: of the gradient before clipping, one an update.
        losses: as a script would log them, one an update.
        rate: the learning rate at the end.
    """

    weights: torch.Tensor
    norms: list[float]
    losses: list[float]
    rate: float


@cache
def whole_batches(rows=ROWS, dtype=torch.float64):
    """Whole batches in PyTorch alone."""
    model = Net().to(dtype)
    optimizer, schedule = optimizer_and_schedule(model)
    norms, losses = [], []
    for _ in range(EPOCHS):
        for batch in DataLoader(data(rows), BATCH):
            optimizer.zero_grad()
            loss = loss_of(model)(batch)
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return Trained(flat(model), norms, losses, schedule.get_last_lr()[0])


def error(weights, rows=ROWS):
    """The largest difference of a weight, in units of the largest way that one went."""
    due = whole_batches(rows).weights
    return float((weights - due).abs().max() / (due - flat(Net().double())).abs().max())


def assert_whole(found, rows=ROWS):
    """Raises unless a loop did what whole batches do."""
    due = whole_batches(rows)
    assert error(found.weights, rows) <= 1e-11
    torch.testing.assert_close(found.norms, due.norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.losses, due.losses, rtol=1e-12, atol=0)
    assert found.rate == due.rate


def assert_wrong(found, rows=ROWS):
    """Raises unless a loop trains something else by as many updates."""
    assert error(found.weights, rows) > WRONG
    assert len(found.norms) == len(whole_batches(rows).norms)
