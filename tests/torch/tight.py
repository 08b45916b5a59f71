"""A plan where fake tensors do not fit, in a process of little address space; prints what came."""

import json
import logging
import os
import resource
import sys
from pathlib import Path

import torch

import virtualbatch.torch as vb

# Fake tensors load 38 MiB. A row of this program takes about a MiB, so some do fit and not all.
ROOM = 30 * 2**20


lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("virtualbatch").addHandler(handler)
torch.set_num_threads(1)
module = torch.nn.Linear(64, 16)
batch = torch.randn(256, 64)


def loss_fn(x):
    return module(x).repeat(1, 2**13).tanh().mean()


vb.backward(loss_fn, batch[:4], module=module, microbatch_size=4)
before = [p.grad.clone() for p in module.parameters()]
pages = int(Path("/proc/self/statm").read_text().split()[0])
held = pages * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
plan = vb.plan(loss_fn, batch, module=module)
intact = all(torch.equal(p.grad, x) for p, x in zip(module.parameters(), before, strict=True))
results = {"plan": json.loads(plan.to_json()), "log": lines, "intact": intact}
json.dump(results, sys.stdout)
