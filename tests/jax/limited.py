"""Windows that really run out of memory, in a process of little address space; prints what came.

Each case needs memory in proportion to the rows in another phase of a micro-batch. The result is
compared, bit by bit, with one that used the final size from the start, before there was a limit.
"""

import json
import os
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import virtualbatch.jax as vb

ROWS, WIDTH = 64, 2**21
# Room for 8 MiB for each of some 20 rows, beside what was there.
ROOM = 200 * 2**20


def needed(rows, really):
    if really:
        jax.block_until_ready(jnp.ones((rows, WIDTH)))


def window(phase, size):
    """What a window gives, as bytes."""

    @jax.custom_vjp
    def passing(x):
        return x

    def forward(x):
        needed(len(x), phase == "forward")
        return x, None

    def backward(_, gradient):
        needed(len(gradient), phase == "backward")
        return (gradient,)

    passing.defvjp(forward, backward)

    def weight(x):
        needed(len(x), phase == "weight")
        return len(x)

    def loss(w, x, key):
        return jnp.mean(passing(jnp.tanh(x @ w)) * jax.random.bernoulli(key, 0.5, (len(x), 16)))

    x = jax.random.normal(jax.random.key(1), (ROWS, 8))
    run = vb.value_and_grad(loss, weight=weight, key_argnum=2, microbatch_size=size)
    result = run(jnp.ones((8, 16)) / 8, x, jax.random.key(2))
    return [leaf.tobytes() for leaf in jax.tree.leaves(result)]


def one_row_that_does_not_fit():
    def loss(w, x):
        return jnp.mean(x @ w) * jnp.ones(2**30).mean()

    try:
        vb.value_and_grad(loss, microbatch_size=4)(jnp.ones((2, 1)), jnp.ones((4, 2)))
    except MemoryError as error:
        return str(error)
    return "no error"


PHASES = ["forward", "backward", "weight"]
# Whatever a size compiles and keeps is there before the limit.
due = {(phase, size): window(phase, size) for phase in PHASES for size in (64, 32, 16, 8, 4)}
pages = int(Path("/proc/self/statm").read_text().split()[0])
held = pages * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
results = {}
for phase in PHASES:
    got = window(phase, ROWS)
    results[phase] = next((size for size in (32, 16, 8, 4) if due[phase, size] == got), None)
results["one row"] = one_row_that_does_not_fit()
json.dump(results, sys.stdout)
