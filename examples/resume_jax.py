"""JAX: a training that may be killed at any moment, and goes on to the same bits.

Kill it and start it again, as often as you like: its last line stays the same. The state of a
training is one tree; keys and batches follow from the number of updates, so nothing else is saved.
"""

import hashlib
import os
from pathlib import Path

import jax
import numpy as np
import optax

import virtualbatch.jax as vb

UPDATES, BATCH, EVERY, FILE = 36, 128, 4, Path("resume_jax.npz")
draw = np.random.default_rng(0)
x = draw.normal(size=(1500, 20)).astype("float32")
y = (x[:, :3] + x[:, 3:6] ** 2).argmax(1)
optimizer = optax.adamw(optax.cosine_decay_schedule(0.01, UPDATES))


def loss_fn(params, batch, key):
    hidden = jax.nn.relu(batch["x"] @ params["first"])
    found = hidden * jax.random.bernoulli(key, 0.8, hidden.shape) / 0.8 @ params["last"]
    return optax.softmax_cross_entropy_with_integer_labels(found, batch["y"]).mean()


@jax.jit
def update(state, batch):
    key = jax.random.fold_in(jax.random.key(1), state["updates"])
    run = vb.value_and_grad(loss_fn, microbatch_size=32, key_argnum=2)
    gradients = run(state["params"], batch, key)[1]
    changes, rest = optimizer.update(gradients, state["optimizer"], state["params"])
    params, updates = optax.apply_updates(state["params"], changes), state["updates"] + 1
    return {"params": params, "optimizer": rest, "updates": updates}


def batch_of(updates):
    epoch, number = divmod(updates, -(-len(x) // BATCH))
    rows = np.random.default_rng(epoch).permutation(len(x))[number * BATCH :][:BATCH]
    return {"x": x[rows], "y": y[rows]}


shapes = {"first": (20, 32), "last": (32, 3)}
params = {name: draw.normal(0, 0.2, shape).astype("float32") for name, shape in shapes.items()}
state = {"params": params, "optimizer": optimizer.init(params), "updates": np.int32(0)}
if FILE.exists():
    with np.load(FILE) as saved:
        state = jax.tree.unflatten(jax.tree.structure(state), saved.values())
print(f"begins after {state['updates']} updates", flush=True)
while (updates := int(state["updates"])) < UPDATES:
    state = update(state, batch_of(updates))
    if (updates + 1) % EVERY == 0:  # a checkpoint after every fourth update
        np.savez("aside.npz", *jax.tree.leaves(state))
        os.replace("aside.npz", FILE)  # in one move: a checkpoint is never half written
weights = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in state["params"].values()))
print(f"{updates} updates, weights {weights.hexdigest()[:16]}")
FILE.unlink()
