"""JAX on a mesh: each device accumulates its own rows, and all are summed once per update.

Four host devices stand for four accelerators.
"""

import os
import re

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import virtualbatch.jax as vb

ROWS, WIDTH, HIDDEN = 512, 16, 64


def loss(params, batch):
    """The mean over the tokens that count."""
    hidden = jnp.tanh(batch["x"] @ params["w1"])
    errors = (hidden @ params["w2"] - batch["y"]) ** 2
    return jnp.sum(errors * batch["mask"]) / jnp.sum(batch["mask"])


keys = jax.random.split(jax.random.key(0), 5)
params = {
    "w1": jax.random.normal(keys[0], (WIDTH, HIDDEN)) / 4,
    "w2": jax.random.normal(keys[1], (HIDDEN, WIDTH)) / 8,
}
batch = {
    "x": jax.random.normal(keys[2], (ROWS, WIDTH)),
    "y": jax.random.normal(keys[3], (ROWS, WIDTH)),
    "mask": jax.random.bernoulli(keys[4], 0.4, (ROWS, WIDTH)),
}
_, due = jax.value_and_grad(loss)(params, batch)

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
with jax.set_mesh(mesh):
    update = vb.value_and_grad(
        loss, microbatch_size=32, weight=lambda batch: batch["mask"].sum(), axis_name="data"
    )
    spread = jax.device_put(params, P()), jax.device_put(batch, P("data"))
    program = jax.jit(update).lower(*spread).compile()
    value, gradients = program(*spread)

text = program.as_text()
differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), gradients, due)
rows = {int(n) for n in re.findall(rf"f32\[(\d+),{HIDDEN}\]\S* dot\(", text)} - {WIDTH}
print(
    f"loss {value:.4f}; gradients differ by {max(jax.tree.leaves(differences)):.0e} from one device"
)
print(f"{len(re.findall(r' all-reduce(?:-start)?[(]', text))} reductions per update of {ROWS} rows")
print(f"each device multiplies {rows} rows at a time")
