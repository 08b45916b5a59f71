"""Accelerate: a script whose update is that of the whole batch, by one line that changes.

The labels that count are 5 to 80 % of a row, so a mean of the micro-batches' means is another loss.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import virtualbatch.torch as vb

WORDS, ROWS, BATCH, STEPS = 50, 120, 40, 8
torch.manual_seed(0)
ids, labels = torch.randint(0, WORDS, (2, ROWS, 12))
counts = torch.rand(ROWS, 12) < torch.rand(ROWS, 1) * 0.75 + 0.05
data = TensorDataset(ids, torch.where(counts, labels, -100))


def train(batch_size, steps=1, microbatch_size=None):
    """The weights after an epoch, and the loss that was logged last."""
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    net = nn.Sequential(nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)).double()
    adamw = torch.optim.AdamW(net.parameters(), 0.01)
    model, optimizer, loader = accelerator.prepare(net, adamw, DataLoader(data, batch_size))

    def loss_fn(batch):
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    for batch in loader:
        with accelerator.accumulate(model):
            if microbatch_size is None:
                loss = loss_fn(batch)
            else:
                loss = vb.loss(  # the line that changes
                    loss_fn,
                    batch,
                    module=model,
                    microbatch_size=microbatch_size,
                    weight=lambda batch: (batch[1] != -100).sum(),
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return nn.utils.parameters_to_vector(net.parameters()).detach(), loss.item()


usual, usual_loss = train(BATCH // STEPS, STEPS)
whole, whole_loss = train(BATCH)
ours, our_loss = train(BATCH, microbatch_size=BATCH // STEPS)
off, usual_off = (ours - whole).abs().max(), (usual - whole).abs().max()
print(f"whole batches of {BATCH}: last loss {whole_loss:.6f}")
print(f"cut into {STEPS} by us: last loss {our_loss:.6f}, weights off by {off:.0e}")
print(f"accumulate, {STEPS} steps: last loss {usual_loss:.6f}, weights off by {usual_off:.0e}")
assert off < 1e-9 < 1e-2 < usual_off
