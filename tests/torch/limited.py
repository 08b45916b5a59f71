"""Windows that really run out of memory, in a process of little address space; prints what came.

Each case needs memory in proportion to the rows in another phase of a micro-batch. The update is
compared, bit by bit, with one that used the final size from the start, before there was a limit.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch
from torch import nn

import virtualbatch.torch as vb

ROWS, WIDTH = 64, 2**20
# Room for 4 MiB for each of some 20 rows, beside what was there.
ROOM = 100 * 2**20


class Needs(torch.autograd.Function):
    """Passes through; needs 4 MiB for every row in the phase that it is told."""

    @staticmethod
    def forward(ctx, x, phase):
        ctx.phase = phase
        needed(x, phase == "forward")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        needed(gradient, ctx.phase == "backward")
        return gradient.clone(), None


def needed(x, really):
    if really:
        torch.ones(len(x), WIDTH).sum()


def window(phase, size):
    """What a window gives, as bytes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 1))
    batch = torch.randn(ROWS, 8)

    def weight(x):
        needed(x, phase == "weight")
        return len(x)

    def loss_fn(x):
        return Needs.apply(module(x), phase).mean()

    loss = vb.backward(loss_fn, batch, module=module, microbatch_size=size, weight=weight)
    found = [loss, *(p.grad for p in module.parameters()), *module.buffers()]
    found.append(torch.get_rng_state())
    return [tensor.numpy().tobytes() for tensor in found]


def one_row_that_does_not_fit():
    module = nn.Linear(2, 1)
    before = [p.clone() for p in module.parameters()]

    def loss_fn(x):
        return module(x).mean() * torch.ones(2**30).mean()

    try:
        vb.backward(loss_fn, torch.ones(4, 2), module=module, microbatch_size=4)
    except MemoryError as error:
        intact = all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        return str(error) if intact and all(p.grad is None for p in module.parameters()) else ""
    return "no error"


torch.set_num_threads(1)
PHASES = ["forward", "backward", "weight"]
due = {(phase, size): window(phase, size) for phase in PHASES for size in (32, 16, 8, 4)}
pages = int(Path("/proc/self/statm").read_text().split()[0])
held = pages * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
results = {}
for phase in PHASES:
    got = window(phase, ROWS)
    results[phase] = next((size for size in (32, 16, 8, 4) if due[phase, size] == got), None)
results["one row"] = one_row_that_does_not_fit()
json.dump(results, sys.stdout)
