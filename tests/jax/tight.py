"""A plan in a process of little address space; prints what came.

A row of this program takes half a MiB, and so much again in kernels that XLA does not count.
"""

import json
import os
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import virtualbatch.jax as vb

# Else temporaries are freed a moment after a result is ready: they may be held when the limit is
# set and gone when the plan reads what is left.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def loss(params, batch):
    return jnp.tanh(jnp.tile(batch @ params, (1, 2**13))).mean()


params, batch = jnp.ones((64, 16)), jnp.ones((256, 64))
# What a program loads is there before the limit, and every thread has worked: one that begins later
# would need memory of its own, and glibc ends the process where there is none.
update = jax.jit(vb.value_and_grad(loss, microbatch_size=2))
for _ in range(20):
    jax.block_until_ready(update(params, batch[:4]))
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
plan = vb.plan(loss)(params, batch)
json.dump({"plan": json.loads(plan.to_json())}, sys.stdout)
