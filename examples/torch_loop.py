"""PyTorch: a training loop with batches of 128 on the memory of 32 rows.

`vb.backward` stands where `loss_fn(batch).backward()` stood; the optimizer and the schedule stay.
The last batch of an epoch is short, and the loop checks that the result is that of whole batches.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import virtualbatch.torch as vb

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
dataset = TensorDataset(torch.as_tensor(images / 16), torch.as_tensor(labels))
start = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()


def train(microbatch_size=None):
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.5)

    def loss_fn(batch):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    for epoch in range(4):
        torch.manual_seed(epoch)
        for batch in DataLoader(dataset, batch_size=128, shuffle=True):
            optimizer.zero_grad()
            if microbatch_size is None:
                loss = loss_fn(batch)
                loss.backward()
            else:
                loss = vb.backward(loss_fn, batch, module=model, microbatch_size=microbatch_size)
            optimizer.step()
            schedule.step()
    x, y = dataset.tensors
    accuracy = (model(x).argmax(1) == y).double().mean()
    name = "whole batches" if microbatch_size is None else f"micro-batches of {microbatch_size}"
    print(f"{name:20} last loss {loss.item():.12f}, accuracy {accuracy:.4f}")
    return model.state_dict()


whole, accumulated = train(), train(microbatch_size=32)
apart = max((whole[name] - accumulated[name]).abs().max().item() for name in whole)
print(f"largest difference of a weight after 60 updates: {apart:.1e}")
assert apart < 1e-9, "the weights are not those of whole batches"
