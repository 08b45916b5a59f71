"""Equinox: a model with leaves that are no parameters, on batches of 130 on the memory of 32 rows.

`grad_fn=eqx.filter_value_and_grad` differentiates with respect to what Equinox takes for
parameters; `eqx.filter_jit` compiles the update as always.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import virtualbatch.jax as vb

x = jax.random.normal(jax.random.key(1), (130, 8))
batch = {"x": x, "y": jnp.sin(x.sum(1, keepdims=True))}
# Its activation functions are leaves, too.
model = eqx.nn.MLP(8, 1, width_size=64, depth=2, key=jax.random.key(0))
optimizer = optax.adam(0.003)


def loss(model, batch):
    return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)


value_and_grad = vb.value_and_grad(loss, microbatch_size=32, grad_fn=eqx.filter_value_and_grad)
_, whole = eqx.filter_value_and_grad(loss)(model, batch)
_, accumulated = eqx.filter_jit(value_and_grad)(model, batch)
pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(accumulated), strict=True)
apart = max(float(jnp.abs(a - b).max()) for a, b in pairs)
print(f"largest difference from the whole batch's gradient: {apart:.1e}")
assert apart < 1e-5


@eqx.filter_jit(donate="all-except-first")
def update(batch, model, state):
    value, gradients = value_and_grad(model, batch)
    changes, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, changes), state, value


state = optimizer.init(eqx.filter(model, eqx.is_array))
losses = []
for _ in range(50):
    model, state, value = update(batch, model, state)
    losses.append(float(value))
print(f"loss of the first update {losses[0]:.3f}, of the last {losses[-1]:.3f}")
