"""Flax NNX: a model with dropout, trained on batches of 120 on the memory of 32 rows.

The model is split, and merged inside the loss; dropout's key is folded for each micro-batch.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import virtualbatch.jax as vb


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)
        self.last = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x, rngs=None):
        hidden = jnp.tanh(self.first(x))
        hidden = hidden if rngs is None else self.dropout(hidden, rngs=rngs)
        return self.last(hidden)


x = jax.random.normal(jax.random.key(1), (120, 8))
batch = {"x": x, "y": jnp.sin(x.sum(1, keepdims=True))}
model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)


def mean_squared_error(model, batch, rngs=None):
    return jnp.mean((model(batch["x"], rngs) - batch["y"]) ** 2)


graph, params, rest = nnx.split(model, nnx.Param, ...)
ours = vb.value_and_grad(
    lambda params, batch: mean_squared_error(nnx.merge(graph, params, rest), batch),
    microbatch_size=32,
)
whole, (_, accumulated) = nnx.grad(mean_squared_error)(model, batch), ours(params, batch)
apart = optax.tree.norm(jax.tree.map(jnp.subtract, whole, accumulated), ord="inf")
print(f"without dropout, largest difference from the whole batch's gradient: {apart:.1e}")
assert apart < 1e-5


@nnx.jit
def update(model, optimizer, batch, key):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, batch, key):
        return mean_squared_error(nnx.merge(graph, params, rest), batch, nnx.Rngs(key))

    value, gradients = vb.value_and_grad(loss, microbatch_size=32, key_argnum=2)(params, batch, key)
    optimizer.update(model, gradients)
    return value


losses = [float(update(model, optimizer, batch, jax.random.key(k))) for k in range(50)]
print(f"loss of the first update {losses[0]:.3f}, of the last {losses[-1]:.3f}")
