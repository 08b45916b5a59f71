"""Other transformations of JAX around a window, and inside its loss."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from tests.jax.problems import (
    MODES,
    assert_same,
    batch,
    in_mode,
    loss,
    on_device,
    params,
    term_weights,
    terms,
    token_loss,
    tokens,
    uncut,
)
from tests.tiers import tiered

import virtualbatch.jax as vb

P, B = params(), batch()
WINDOW = vb.value_and_grad(loss, microbatch_size=4)


@jax.custom_vjp
def clipped(x):
    return x**2


clipped.defvjp(lambda x: (x**2, x), lambda x, g: (3 * x * g,))


@jax.custom_jvp
def bent(x):
    return x**2


bent.defjvp(lambda x, t: (x[0] ** 2, 5 * x[0] * t[0]))


def scanned(params, batch):
    def turn(carry, weight):
        return jnp.tanh(carry * weight + batch["x"][:, 0]), None

    return jnp.mean(lax.scan(turn, jnp.asarray(batch["y"]), params["w"])[0]) + params["b"]


LOSSES = {
    "checkpoint": jax.checkpoint(loss),
    "jit": jax.jit(loss),
    "scan": scanned,
    "fori_loop": lambda p, b: lax.fori_loop(
        0, 3, lambda _, c: c * p["b"] + jnp.mean(b["x"] @ p["w"]), 0.0
    ),
    "while_loop": lambda p, b: loss(p, b) * lax.while_loop(lambda c: c < 5, lambda c: c + 1, 0),
    "cond": lambda p, b: lax.cond(p["b"] > 0, lambda: loss(p, b), lambda: 0.0),
    "custom_vjp": lambda p, b: jnp.mean(clipped(b["x"] @ p["w"])) + p["b"],
    "custom_jvp": lambda p, b: jnp.mean(bent(b["x"] @ p["w"])) + p["b"],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", tiered(LOSSES, ["scan", "cond", "custom_vjp"], "further programs"))
def test_inside_the_loss(name, mode):
    def both(params, batch):
        return {"tested": LOSSES[name](params, batch), "tokens": token_loss(params, batch)}

    def weight(batch):
        return {"tested": len(batch["y"]), "tokens": tokens(batch)}

    ours = in_mode(mode, vb.value_and_grad(both, microbatch_size=4, weight=weight))
    assert_same(ours(P, B), uncut(both, P, B))


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_the_result(mode):
    value = in_mode(mode, jax.grad(lambda p: WINDOW(p, on_device(B))[0]))(P)
    assert_same(value, jax.grad(loss)(P, B))

    def norm(gradients):
        return lambda p: sum((g**2).sum() for g in jax.tree.leaves(gradients(p, B)))

    ours = in_mode(mode, jax.grad(norm(lambda p, b: WINDOW(p, on_device(b))[1])))(P)
    assert_same(ours, jax.grad(norm(jax.grad(loss)))(on_device(P)))
    tangents = jax.jvp(lambda p: WINDOW(p, B)[0], (on_device(P),), (on_device(P),))
    assert_same(tangents, jax.jvp(lambda p: loss(p, B), (on_device(P),), (on_device(P),)))


@pytest.mark.parametrize("mode", tiered(MODES, MODES[1:], "un-jitted, batching is traced anew"))
@pytest.mark.parametrize("axis", tiered([0, 1], [1], "the other axis"))
def test_vmap_over_models_and_over_batches(axis, mode):
    models = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), P)
    batches = jax.tree.map(lambda x: jnp.stack([x, x[::-1]], axis=axis), B)
    ours = vb.value_and_grad(terms, microbatch_size=4, weight=term_weights)

    def due(params, batch):
        return uncut(terms, params, batch)

    found = in_mode(mode, jax.vmap(ours, (0, None)))(models, B)
    assert_same(found, jax.vmap(due, (0, None))(models, B))
    found = in_mode(mode, jax.vmap(ours, (None, axis)))(P, batches)
    assert_same(found, jax.vmap(due, (None, axis))(P, batches))


@pytest.mark.parametrize("mode", MODES)
def test_values_that_the_loss_closes_over(mode):
    def ours(factor):
        # Neither argument is traced, but the loss and the weight are.
        run = vb.value_and_grad(
            lambda p, b: {"loss": token_loss(p, b) * factor},
            microbatch_size=4,
            weight=lambda batch: {"loss": tokens(batch) * factor},
        )
        return run(on_device(P), on_device(B))

    found = in_mode(mode, ours)(jnp.asarray(3.0))
    assert_same(found, uncut(lambda p, b: token_loss(p, b) * 3.0, P, B))

    def value(factor):
        return vb.value_and_grad(lambda p, b: loss(p, b) * factor, microbatch_size=4)(P, B)[0]

    assert_same(in_mode(mode, jax.grad(value))(2.0), loss(on_device(P), B))


def test_under_jit_everything_is_a_loop_even_where_no_argument_is_traced():
    program = jax.make_jaxpr(
        lambda s: vb.value_and_grad(lambda p, b: loss(p, b) * s, microbatch_size=2)(P, B)
    )(3.0)
    assert str(program).count("scan[") == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_window_inside_a_window(mode):
    inner = vb.value_and_grad(loss, microbatch_size=2)
    outer = vb.value_and_grad(lambda p, b: inner(p, b)[0], microbatch_size=4)
    assert_same(in_mode(mode, outer)(P, B), jax.value_and_grad(loss)(P, B))


def test_a_program_is_pure_and_the_same_each_time():
    first, second = (jax.make_jaxpr(WINDOW)(P, B) for _ in range(2))
    assert str(first) == str(second)
    assert not first.effects
    shapes = jax.eval_shape(WINDOW, P, B)
    assert jax.tree.map(lambda x: x.shape, shapes) == ((), {"w": (3,), "b": ()})


def test_only_our_own_sums_are_donated():
    # Gradients that are an array of the caller, in eager mode even the same buffer.
    p, constant = on_device(P), jnp.arange(3.0)
    window = vb.Window([{"c": constant[None]}, {"c": constant[None]}])
    run = vb.value_and_grad(lambda p, b: jnp.dot(p["w"], b["c"][0]) + jnp.dot(p["w"], constant))
    for _ in range(2):
        assert_same(run(p, window)[1]["w"], 2 * jnp.arange(3.0))
        assert_same(constant, jnp.arange(3.0))
        assert not any(x.is_deleted() for x in jax.tree.leaves((p, window)))

    @jax.jit
    def whole(params, batch):
        return jax.tree.map(jnp.subtract, params, jax.grad(loss)(params, batch))

    update = jax.jit(lambda p, b: jax.tree.map(jnp.subtract, p, WINDOW(p, b)[1]), donate_argnums=0)
    due = whole(p, B)
    assert_same(update(p, B), due)
    assert p["w"].is_deleted()
