"""certify_loop on loops as people write them for JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.tiers import tiered

import virtualbatch.jax as vb

RNG = np.random.default_rng(0)
BATCHES = [{"x": RNG.normal(size=(12, 5)), "y": RNG.normal(size=(12, 2))} for _ in range(2)]


def loss(params, batch):
    return ((jnp.tanh(batch["x"] @ params["w"]) + params["b"] - batch["y"]) ** 2).mean()


def start(optimizer):
    params = {"w": jnp.asarray(RNG.normal(size=(5, 2))), "b": jnp.zeros(2)}
    return {"params": params, "slots": optimizer.init(params)}


def summing(optimizer, divisor=lambda window, steps: len(window), drop=False):
    @jax.jit
    def update(state, gradients):
        updates, slots = optimizer.update(gradients, state["slots"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "slots": slots}

    def loop(state, microbatches, accumulation_steps):
        for first in range(0, len(microbatches), accumulation_steps):
            window = microbatches[first : first + accumulation_steps]
            if drop and len(window) < accumulation_steps:
                break
            gradients = [jax.grad(loss)(state["params"], piece) for piece in window]
            total = jax.tree.map(lambda *g: sum(g), *gradients)
            scale = 1 / divisor(window, accumulation_steps)
            state = update(state, optax.tree.scale(scale, total))
        return state

    return loop


@pytest.mark.parametrize(
    "make", tiered([optax.sgd, optax.adam], [optax.adam], "a further optimizer")
)
def test_no_false_alarm(make):
    optimizer = make(0.1)
    found = vb.certify_loop(summing(optimizer), start(optimizer), BATCHES, microbatch_size=3)
    assert found.findings == (), found
    assert found.exact
    assert "['params']['w']" in found.parameters


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        ({"divisor": lambda window, steps: 1}, "sum_loss", "4 times"),
        ({"divisor": lambda window, steps: steps}, "last_window", "0.5 times"),
        ({"drop": True}, "last_window", "dropped"),
    ],
)
def test_the_mistake_is_named(options, kind, why):
    optimizer = optax.sgd(0.1)
    loop = summing(optimizer, **options)
    found = vb.certify_loop(loop, start(optimizer), BATCHES, microbatch_size=3)
    assert not found.exact
    assert found.findings[0].kind == kind, found
    assert why in found.findings[0].why


@pytest.mark.thorough("a further loop with the same mistake")
def test_multi_steps_drops_the_last_window():
    # As its users call it: one update per micro-batch, of which every k-th one counts.
    inner = optax.adam(0.1)

    def loop(state, microbatches, accumulation_steps):
        optimizer = optax.MultiSteps(inner, accumulation_steps)
        slots = optimizer.init(state["params"])._replace(inner_opt_state=state["slots"])
        params = state["params"]
        for piece in microbatches:
            updates, slots = optimizer.update(jax.grad(loss)(params, piece), slots, params)
            params = optax.apply_updates(params, updates)
        return {"params": params, "slots": slots.inner_opt_state}

    found = vb.certify_loop(loop, start(inner), BATCHES, microbatch_size=3)
    # Its running mean divides in float32, though these parameters are float64.
    assert [finding.kind for finding in found.findings] == ["low_precision", "last_window"]
    assert "dropped" in found.findings[1].why
