"""Flax: random numbers of a module's own, scaled losses, float8; as guides/jax_flax.md says."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from tests.jax.problems import MODES, assert_same, in_mode
from tests.oracle import tolerance
from tests.tiers import tiered

import virtualbatch.jax as vb

ROWS = 8
JITTED = tiered(MODES, ["jit"], "un-jitted, a framework calls what it calls jitted")


@pytest.fixture(autouse=True)
def _float32():
    with jax.enable_x64(False):
        yield


def same(actual, expected):
    assert_same(actual, expected, tolerance("float32", 64))


class Model(nnx.Module):
    """Dropout with random numbers of its own, as tutorials have it, and a counter."""

    def __init__(self, rngs, rate=0.5):
        self.first = nnx.Linear(4, 32, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(32, 1, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.asarray(0))

    def __call__(self, x):
        self.calls[...] += 1
        hidden = self.dropout(jnp.tanh(self.first(x)))
        return self.last(hidden), hidden


def squared(model, x):
    outputs, hidden = model(x)
    return jnp.mean(outputs**2), hidden


@nnx.jit
def update(model, optimizer, x):
    key = model.dropout.rngs()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, key):
        merged = nnx.merge(graph, params, rest, copy=True)
        nnx.reseed(merged, default=key)
        value, hidden = squared(merged, x)
        return value, (hidden, nnx.state(merged, nnx.BatchStat))

    run = vb.value_and_grad(loss, has_aux=True, microbatch_size=2, key_argnum=2)
    (value, (hidden, new)), gradients = run(params, x, key)
    nnx.update(model, new)
    optimizer.update(model, gradients)
    return value, hidden, gradients


def test_nnx_dropout_with_random_numbers_of_its_own():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=nnx.Param)
    masks = [np.asarray(update(model, optimizer, jnp.ones((ROWS, 4)))[1]) != 0 for _ in range(3)]
    # Equal rows, so masks alone differ: between micro-batches, and between updates.
    assert len(np.unique(np.concatenate(masks), axis=0)) == 3 * ROWS
    assert int(model.calls[...]) == 3


def test_nnx_dropout_of_rate_0_is_the_whole_batch():
    model = Model(nnx.Rngs(0), rate=0.0)
    optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (ROWS, 4))
    value, _, gradients = update(model, optimizer, x)
    (due, _), due_gradients = nnx.value_and_grad(squared, has_aux=True)(model, x)
    same(value, due)
    same(nnx.to_pure_dict(gradients), nnx.to_pure_dict(due_gradients))


def merged_outside(model, x):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        return squared(nnx.merge(graph, params, rest), x)[0]

    return vb.value_and_grad(loss, microbatch_size=2)(params, x)


def changed_outside(model, x):
    params = nnx.state(model, nnx.Param)
    return vb.value_and_grad(lambda _, x: squared(model, x)[0], microbatch_size=2)(params, x)


def differentiated_by_nnx(model, x):
    loss = lambda model, x: squared(model, x)[0]  # noqa: E731
    return vb.value_and_grad(loss, microbatch_size=2, grad_fn=nnx.value_and_grad)(model, x)


@pytest.mark.parametrize("way", [merged_outside, changed_outside, differentiated_by_nnx])
def test_nnx_state_from_outside_of_the_loss_is_refused(way):
    with pytest.raises(ValueError, match=r"must not change a module .* copy=True\)\. .*key_argnum"):
        nnx.jit(way)(Model(nnx.Rngs(0)), jnp.ones((ROWS, 4)))


def test_a_module_that_is_differentiated_whole_is_refused():
    loss = lambda model, x: squared(model, x)[0]  # noqa: E731
    with pytest.raises(TypeError, match=r"floating numbers only\. Got .* Split the rest off: nnx"):
        vb.value_and_grad(loss, microbatch_size=2)(Model(nnx.Rngs(0)), jnp.ones((ROWS, 4)))


class Float8(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, dot_general_cls=linen.Fp8DirectDotGeneralOp, name="dense")(x)


@pytest.mark.parametrize("mode", JITTED)
def test_float8_scales_are_the_largest_and_not_averaged(mode):
    model = Float8()
    x = jax.random.normal(jax.random.key(1), (16, 8))
    names = ("_overwrite_with_gradient", "dense", "Fp8DirectDotGeneralOp_0")

    def loss(variables, x):
        return jnp.mean(model.apply(variables, x) ** 2)

    def weight(x):
        return jnp.where(x.sum() > 1e3, 1.0, 0.0)

    ours = in_mode(mode, vb.value_and_grad(loss, microbatch_size=4, stats=True))
    due = in_mode(mode, jax.value_and_grad(loss))
    empty = in_mode(mode, vb.value_and_grad(loss, microbatch_size=4, weight=weight))
    mine = whole = model.init(jax.random.key(0), x)
    for _ in range(2):
        _, gradients, stats = ours(mine, x)
        found, expected = gradients[names[0]], due(whole, x)[1][names[0]]
        mine, whole = mine | {names[0]: found}, whole | {names[0]: expected}
        found, expected = found[names[1]][names[2]], expected[names[1]][names[2]]
        for name in ("input", "kernel"):
            same(found[f"{name}_amax_history"], expected[f"{name}_amax_history"])
            same(found[f"{name}_scale"], expected[f"{name}_scale"])
        # A micro-batch's mean divides by a fourth of the rows, and float8 must hold its gradient.
        history = "output_grad_amax_history"
        assert 3 < float(found[history][0] / expected[history][0]) < 5
        norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients["params"]))
        same(stats.square, norm)
    # Nothing counts, and the scales stay what they were.
    last = empty(mine, x)[1][names[0]][names[1]][names[2]]
    same(last["input_scale"], ours(mine, x)[1][names[0]][names[1]][names[2]]["input_scale"])


def half_loss(params, x):
    # The gradient with respect to the product is lost in float16 unless the loss is scaled.
    return jnp.mean((x.astype(jnp.float16) * params["w"].astype(jnp.float16)) * 1e-4) * 1e-3


def scaled_update(params, dynamic_scale, x):
    def scaled(function, has_aux):
        run = dynamic_scale.value_and_grad(function, has_aux=has_aux)
        return lambda *args: run(*args)[2:]

    value, gradients = vb.value_and_grad(half_loss, microbatch_size=2, grad_fn=scaled)(params, x)

    def linear(params):
        return optax.tree.vdot(params, gradients)

    dynamic_scale, finite, _, gradients = dynamic_scale.value_and_grad(linear)(params)
    return value, gradients, finite, dynamic_scale


@pytest.mark.parametrize("mode", JITTED)
def test_dynamic_scale_of_flax(mode):
    params = {"w": jnp.ones(())}
    x = jax.random.uniform(jax.random.key(0), (ROWS, 4), minval=1.0, maxval=2.0)
    scale = DynamicScale(scale=jnp.asarray(2.0**14), growth_interval=1, fin_steps=jnp.asarray(1))
    run = in_mode(mode, scaled_update)
    value, gradients, finite, new = run(params, scale, x)
    whole = scale.value_and_grad(half_loss)(params, x)
    assert float(jax.grad(half_loss)(params, x)["w"]) == 0
    assert_same(gradients, whole.grad, 0.05)
    assert_same(value, whole.aux, 0.05)
    assert bool(finite)
    assert float(new.scale) == float(whole.dynamic_scale.scale) == 2.0**15
    # Rows that overflow in one micro-batch halve the scale, once.
    _, _, finite, new = run(params, scale, x.at[3].set(jnp.inf))
    assert not bool(finite)
    assert float(new.scale) == 2.0**13


def test_dynamic_scale_in_the_wrong_place():
    params, x = {"w": jnp.ones(())}, jnp.ones((ROWS, 4))
    scale = DynamicScale()
    with pytest.raises(
        TypeError, match=r"Got a DynamicScaleResult of 4\. .*\[2:\]\. docs/guides/jax"
    ):
        vb.value_and_grad(half_loss, microbatch_size=2, grad_fn=scale.value_and_grad)(params, x)
    for has_aux in (False, True):
        run = vb.value_and_grad(scale.value_and_grad(half_loss), has_aux=has_aux, microbatch_size=2)
        with pytest.raises(TypeError, match=r"not its gradients\. Got a DynamicScaleResult\."):
            run(params, x)
