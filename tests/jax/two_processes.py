"""One of two processes of JAX, of two devices each, which train on rows of their own.

Run by test_two_processes.py: `python -m tests.jax.two_processes CHECK NUMBER PORT`.
"""

import os
import sys
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tests.jax.problems import assert_same, batch, params, token_loss, tokens, uncut

import virtualbatch.jax as vb

# Seconds, of JAX' 100 and 300: without a sign of life, and until all others end as well.
HEARTBEAT, SHUTDOWN = 4, 4
ROWS, DEVICES = 24, 4
PARAMS, BATCH = params(), batch(ROWS)


def gradients_of(first, last, length):
    """(value, gradients) of the rows of both processes.

    Args:
        first: number of the first row of this process.
        last: of the first that is no longer its own.
        length: rows that every process has, with padding that weighs nothing.
    """
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def padded(x):
        own = x[first:last]
        return np.concatenate([own, np.zeros((length - len(own), *own.shape[1:]), own.dtype)])

    def placed(x, spec):
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    rows = jax.tree.map(lambda x: placed(padded(x), P("data")), BATCH)
    weights = jax.tree.map(lambda x: placed(np.asarray(x), P()), PARAMS)
    run = vb.value_and_grad(token_loss, microbatch_size=2, weight=tokens, axis_name="data")
    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P())}
    return jax.jit(jax.shard_map(run, mesh=mesh, **specs))(weights, rows)


def assert_exact(number, rows, length):
    """The gradients, where the first process has so many rows."""
    found = gradients_of(*((0, rows), (rows, ROWS))[number], length)
    assert_same(jax.tree.map(np.asarray, found), uncut(token_loss, PARAMS, BATCH))


def exact(number):
    for rows, length in ((12, 12), (5, 20), (0, 24)):
        assert_exact(number, rows, length)
        print("ok", rows, ROWS - rows, flush=True)


def exits(number):
    assert_exact(number, 12, 12)
    if number == 1:
        os._exit(3)
    jax.block_until_ready(gradients_of(0, 12, 12))


def raises(number):
    assert_exact(number, 12, 12)
    if number == 1:
        raise ValueError("a bug in one process")
    jax.block_until_ready(gradients_of(0, 12, 12))


def lives_on(number):
    assert_exact(number, 12, 12)
    if number == 1:
        time.sleep(8)
        os._exit(3)
    jax.block_until_ready(gradients_of(0, 12, 12))


if __name__ == "__main__":
    check, number, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=2,
        process_id=number,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    assert len(jax.devices()) == DEVICES
    globals()[check](number)
