"""PyTorch: a contrastive loss over 256 pairs on the memory of 32, with a learned temperature.

Two encoders embed the upper and the lower half of a digit. The loss compares all pairs, so it
cannot be cut. `vb.rowwise` wraps what comes before pairs meet; the loss, the backward pass and the
optimizer stay. The script checks the gradient against that of the uncut batch.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import virtualbatch.torch as vb

torch.manual_seed(0)
images = torch.as_tensor(load_digits().images / 16).reshape(-1, 2, 32)
upper, lower = images[:, 0], images[:, 1]


def encoder():
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).double()


first, second = encoder(), encoder()
temperature = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
trained = [*first.parameters(), *second.parameters(), temperature]
optimizer = torch.optim.AdamW(trained, 0.01)


def contrastive(z, w):
    logits = temperature.exp() * normalize(z, dim=1) @ normalize(w, dim=1).T
    pairs = torch.arange(len(z))
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


in_parts = [vb.rowwise(each, microbatch_size=32) for each in (first, second)]


def gradient(encoders, rows):
    loss = contrastive(encoders[0](upper[rows]), encoders[1](lower[rows]))
    return torch.autograd.grad(loss, trained)


batch = torch.arange(256)
pairs = zip(gradient(in_parts, batch), gradient([first, second], batch), strict=True)
apart = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
print(f"largest difference from the uncut gradient: {apart:.1e}")
assert apart < 1e-12, "the gradient is not that of the uncut batch"

losses = []
for epoch in range(4):
    for rows in torch.randperm(len(images)).split(256):
        optimizer.zero_grad()
        loss = contrastive(in_parts[0](upper[rows]), in_parts[1](lower[rows]))
        loss.backward()
        optimizer.step()
    losses.append(contrastive(first(upper[batch]), second(lower[batch])).item())
    print(f"epoch {epoch}: loss of 256 pairs {losses[-1]:.3f}, scale {temperature.exp():.2f}")
assert losses[-1] < losses[0] - 0.5, "the loss did not fall"
