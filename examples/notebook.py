# %% [markdown]
# # PyTorch: choose a micro-batch, prove it, train, and look at the results
#
# Every `# %%` starts a cell. Open this file in VS Code or PyCharm, or run it as a script.

# %%
# ruff: noqa: B018
import torch
from sklearn.datasets import load_digits
from torch import nn

import virtualbatch.torch as vb
from virtualbatch import NoiseScale
from virtualbatch.report import Report

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(model.parameters(), 0.1)


def loss_fn(batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def random_batch():
    chosen = torch.randint(len(images), (512,))
    return images[chosen], labels[chosen]


# %%
# Which micro-batches fit into the limit, and how fast are they?
plan = vb.plan(loss_fn, random_batch(), module=model, memory_limit="1MB")
plan

# %%
# Does accumulation give the gradient of the whole batch?
size = plan.microbatch_size
certificate = vb.certify(loss_fn, random_batch(), module=model, microbatch_size=size)
certificate

# %%
# How noisy are the gradients? The micro-batches show it during training, at no extra cost.
noise, history = NoiseScale(), []
for update in range(1, 101):
    optimizer.zero_grad()
    batch = random_batch()
    loss, stats = vb.backward(loss_fn, batch, module=model, microbatch_size=size, stats=True)
    optimizer.step()
    noise.update(stats)
    history.append((update, noise.estimate()))
noise.estimate()

# %%
# Everything on one page; `write_html` writes the same page to a file.
certificate.raise_if_inexact()
print(f"micro-batches of {size} rows are exact; loss {loss:.3f}")
Report(plan, certificate, history)
