"""SimCLR in JAX: the NT-Xent loss of 256 digits, on the memory of 64.

Each row is compared with all others, so gradients of micro-batches do not add up. `vb.rowwise` runs
the encoder in micro-batches, and the loss sees the embeddings of all rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import virtualbatch.jax as vb

images = np.asarray(load_digits().images, np.float32) / 16
optimizer = optax.adam(1e-3)


def augmented(random, x):
    x = np.roll(x, random.integers(-1, 2, 2), (1, 2)) * random.uniform(0.6, 1.4, (len(x), 1, 1))
    return (x + random.normal(0, 0.1, x.shape)).reshape(len(x), 64).astype(np.float32)


def encode(params, views):
    """Both views of a row, as two outputs."""
    return [jnp.tanh(view @ params["w"]) @ params["v"] for view in views]


def nt_xent(a, b):
    z = jnp.concatenate([a, b])
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    logits = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, z @ z.T / 0.5)
    partner = jnp.roll(jnp.arange(len(z)), len(a))
    return optax.softmax_cross_entropy_with_integer_labels(logits, partner).mean()


def train(name, encode):
    @jax.jit
    def update(params, state, views):
        value, gradients = jax.value_and_grad(lambda p: nt_xent(*encode(p, views)))(params)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, value

    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (64, 128)) / 8}
    params["v"] = jax.random.normal(keys[1], (128, 32)) / 11
    state, random = optimizer.init(params), np.random.default_rng(0)
    for _ in range(20):
        x = images[random.choice(len(images), 256, replace=False)]
        views = augmented(random, x), augmented(random, x)
        params, state, value = update(params, state, views)
    print(f"{name:20} loss {value:.6f}")
    return params


whole = train("whole batches", encode)
ours = train("micro-batches of 64", vb.rowwise(encode, microbatch_size=64))
apart = max(float(jnp.abs(whole[name] - ours[name]).max()) for name in whole)
print(f"largest difference of a weight after 20 updates: {apart:.1e}")
assert apart < 1e-4, "the weights are not those of whole batches"
