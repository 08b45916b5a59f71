"""PyTorch: a training that may be killed at any moment, and goes on to the same bits.

Kill it and start it again, as often as you like: its last line stays the same. `virtualbatch` keeps
nothing between updates, so the checkpoint is that of any loop in PyTorch.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import virtualbatch.torch as vb

EPOCHS, BATCH, EVERY, FILE = 3, 128, 4, Path("resume_torch.pt")  # a checkpoint each 4th update
torch.manual_seed(0)
x = torch.randn(1500, 20)
data = TensorDataset(x, (x @ torch.randn(20, 3)).argmax(1))
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.8)
scaler = torch.amp.GradScaler("cpu", growth_interval=9)
parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}


def batches(done):
    """The batches after so many updates. The number of an epoch alone decides its order."""
    of_epoch = -(-len(data) // BATCH)
    for epoch in range(done // of_epoch, EPOCHS):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).tolist()
        rest = Subset(data, order[BATCH * max(done - epoch * of_epoch, 0) :])
        # A loader that begins draws a number: from a generator of its own, not from dropout's.
        yield from DataLoader(rest, BATCH, generator=torch.Generator())


def loss_fn(batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


state = torch.load(FILE) if FILE.exists() else {"updates": 0, "random": torch.get_rng_state()}
for name in state.keys() & parts.keys():
    parts[name].load_state_dict(state[name])
torch.set_rng_state(state["random"])  # on a GPU torch.cuda.set_rng_state_all too
updates = state["updates"]
print(f"begins after {updates} updates", flush=True)
for batch in batches(updates):
    optimizer.zero_grad()
    scaler.scale(vb.loss(loss_fn, batch, module=model, microbatch_size=32)).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    updates += 1
    if updates % EVERY == 0:
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"updates": updates, "random": torch.get_rng_state()}, "aside")
        Path("aside").replace(FILE)  # in one move: a checkpoint is never half written
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
print(f"{updates} updates, weights {hashlib.sha256(weights).hexdigest()[:16]}")
FILE.unlink()
