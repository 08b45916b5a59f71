"""An encoder and a loss that sees all rows, and their gradients uncut and in the same pieces."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import virtualbatch.torch as vb

ROWS, WIDTH = 13, 6


def network(*layers):
    torch.manual_seed(3)
    layers = layers or (nn.Tanh(),)
    return nn.Sequential(nn.Linear(WIDTH, 8), *layers, nn.Linear(8, 4)).double()


def rows(count=ROWS):
    torch.manual_seed(4)
    return torch.randn(count, WIDTH, dtype=torch.float64)


def contrastive(z):
    """Each row against its neighbour, among all rows."""
    z = F.normalize(z, dim=1)
    return F.cross_entropy(5 * z @ z.roll(1, 0).T, torch.arange(len(z)))


def taken(*tensors):
    """Gradients as NumPy arrays, of modules or tensors; `.grad` is None afterwards."""
    leaves = [p for x in tensors for p in (x.parameters() if isinstance(x, nn.Module) else [x])]
    found = [None if x.grad is None else x.grad.to_dense().double().numpy() for x in leaves]
    for x in leaves:
        x.grad = None
    return found


def uncut(module, batch, fn=None):
    contrastive((fn or module)(batch)).backward()
    return taken(module)


def in_one_graph(module, batch, count):
    """The loss of the same micro-batches, kept in one graph."""
    module = copy.deepcopy(module)
    loss = contrastive(torch.cat([module(piece) for piece in batch.tensor_split(count)]))
    loss.backward()
    return loss.item(), taken(module), module


def by_rowwise(module, batch, fn=None, **size):
    size = size or {"microbatch_size": 4}
    loss = contrastive(vb.rowwise(fn or module, module=module, **size)(batch))
    loss.backward()
    return loss.item(), taken(module)
