"""JAX with Optax: batches of 128 on the memory of 32 rows.

`vb.value_and_grad` stands where `jax.value_and_grad` stood, inside the jitted update; the optimizer
and its schedule stay. The last batch of an epoch is short, and its rows count like any other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import virtualbatch.jax as vb

images, labels = load_digits(return_X_y=True)
data = {"x": jnp.asarray(images / 16, jnp.float32), "y": jnp.asarray(labels)}
schedule = optax.cosine_decay_schedule(0.01, 60)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def start():
    keys = jax.random.split(jax.random.key(0))
    sizes = [(64, 64), (64, 10)]
    return [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, sizes, strict=True)]


def logits(params, x):
    return jax.nn.relu(x @ params[0]) @ params[1]


def loss(params, batch):
    found = logits(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(found, batch["y"]).mean()


def train(name, value_and_grad):
    def update(params, state, batch):
        value, gradients = value_and_grad(params, batch)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, value

    # Donated, so that the new parameters take the place of the old ones.
    update = jax.jit(update, donate_argnums=(0, 1))
    params = start()
    state = optimizer.init(params)
    for epoch in range(4):
        order = np.random.default_rng(epoch).permutation(len(labels))
        for rows in np.split(order, range(128, len(order), 128)):
            batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)
            params, state, value = update(params, state, batch)
    accuracy = (logits(params, data["x"]).argmax(1) == data["y"]).mean()
    print(f"{name:20} last loss {value:.6f}, accuracy {accuracy:.4f}")
    return params


whole = train("whole batches", jax.value_and_grad(loss))
accumulated = train("micro-batches of 32", vb.value_and_grad(loss, microbatch_size=32))
apart = max(float(jnp.abs(a - b).max()) for a, b in zip(whole, accumulated, strict=True))
print(f"largest difference of a weight after 60 updates: {apart:.1e}")
assert apart < 1e-4, "the weights are not those of whole batches"
