"""Flax (Linen and NNX), Equinox, Optax and Haiku-style functions, as guides/jax_flax.md says."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tests.jax.problems import MODES, assert_same, in_mode
from tests.oracle import assert_close, tolerance
from tests.tiers import tiered

import virtualbatch.jax as vb

MOMENTUM = 0.9
ROWS = 10
# The frameworks meet the same arrays and functions in both modes.
UN_JITTED = "un-jitted, a framework calls what it calls jitted"
JITTED = tiered(MODES, ["jit"], UN_JITTED)


@pytest.fixture(autouse=True)
def _float32():
    # The frameworks make float32 parameters.
    with jax.enable_x64(False):
        yield


def batch():
    random = np.random.default_rng(0)
    x = random.normal(3.0, 2.0, size=(ROWS, 3)).astype("float32")
    return {"x": x, "y": random.normal(size=(ROWS, 1)).astype("float32")}


def same(actual, expected, summands=64):
    assert_same(actual, expected, tolerance("float32", summands))


class Linen(linen.Module):
    norm: bool = False

    @linen.compact
    def __call__(self, x):
        if self.norm:
            x = linen.BatchNorm(use_running_average=False, momentum=MOMENTUM)(x)
        return linen.Dense(1)(jnp.tanh(linen.Dense(8)(x)))


@pytest.mark.parametrize("mode", JITTED)
def test_linen(mode):
    model = Linen()
    params = model.init(jax.random.key(0), batch()["x"])

    def loss(params, batch):
        return jnp.mean((model.apply(params, batch["x"]) - batch["y"]) ** 2)

    ours = in_mode(mode, vb.value_and_grad(loss, microbatch_size=4))
    same(ours(params, batch()), jax.value_and_grad(loss)(params, batch()))


def seen(new, old):
    """What one BatchNorm saw, from its running statistics before and after."""
    mean, var = ((new[k] - MOMENTUM * old[k]) / (1 - MOMENTUM) for k in ("mean", "var"))
    return {"mean": mean, "square": var + (mean - old["mean"]) ** 2}


def updated(seen, old):
    """Its running statistics after the whole batch."""
    mean = seen["mean"]
    var = seen["square"] - (mean - old["mean"]) ** 2
    return {
        "mean": MOMENTUM * old["mean"] + (1 - MOMENTUM) * mean,
        "var": MOMENTUM * old["var"] + (1 - MOMENTUM) * var,
    }


def per_layer(fn, *stats):
    return jax.tree.map(fn, *stats, is_leaf=lambda x: "mean" in x)


@pytest.mark.parametrize("mode", JITTED)
@pytest.mark.parametrize("size", tiered([4, 5], [4], "further cuts"))
def test_linen_batchnorm_statistics_of_all_rows(size, mode):
    model = Linen(norm=True)
    found = model.init(jax.random.key(0), batch()["x"])
    params, stats = found["params"], found["batch_stats"]

    def loss(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        outputs, new = model.apply(variables, batch["x"], mutable=["batch_stats"])
        return jnp.mean((outputs - batch["y"]) ** 2), per_layer(seen, new["batch_stats"], stats)

    ours = vb.value_and_grad(loss, has_aux=True, batch_argnum=2, microbatch_size=size)
    (_, aux), _ = in_mode(mode, ours)(params, stats, batch())
    _, due = model.apply(found, batch()["x"], mutable=["batch_stats"])
    # Dividing by 1 - momentum makes a rounding ten times larger.
    same(per_layer(updated, aux, stats), due["batch_stats"], 10 * ROWS)


class Nnx(nnx.Module):
    def __init__(self, rngs, norm=False):
        self.norm = nnx.BatchNorm(3, momentum=MOMENTUM, rngs=rngs) if norm else None
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.norm(x) if self.norm else x
        return self.last(self.dropout(jnp.tanh(self.first(x)), rngs=rngs))


def nnx_loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def test_nnx_split_and_merge_trains_as_the_whole_batch():
    @nnx.jit
    def update(model, optimizer, batch):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, batch):
            return nnx_loss(nnx.merge(graph, params, rest), batch)

        value, gradients = vb.value_and_grad(loss, microbatch_size=4)(params, batch)
        optimizer.update(model, gradients)
        return value

    @nnx.jit
    def whole(model, optimizer, batch):
        value, gradients = nnx.value_and_grad(nnx_loss)(model, batch)
        optimizer.update(model, gradients)
        return value

    models = []
    for run in (update, whole):
        model = Nnx(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
        values = [run(model, optimizer, batch()) for _ in range(3)]
        models.append((values, nnx.state(model, nnx.Param)))
    # Adam divides by a root, so a rounding of a gradient can count more than once.
    same(*models, summands=1000)


@pytest.mark.parametrize("mode", JITTED)
def test_nnx_batchnorm_statistics_of_all_rows(mode):
    model = Nnx(nnx.Rngs(0), norm=True)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, batch):
        # A copy, whose statistics may change inside the trace.
        merged = nnx.merge(graph, params, rest, copy=True)
        value = nnx_loss(merged, batch)
        new = nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))
        return value, per_layer(seen, new, nnx.to_pure_dict(nnx.state(rest, nnx.BatchStat)))

    ours = vb.value_and_grad(loss, has_aux=True, batch_argnum=2, microbatch_size=4)
    (_, aux), _ = in_mode(mode, ours)(params, rest, batch())
    found = per_layer(updated, aux, nnx.to_pure_dict(nnx.state(rest, nnx.BatchStat)))
    model(jnp.asarray(batch()["x"]))
    same(found, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), 10 * ROWS)


@pytest.mark.thorough("a further way to use the framework")
def test_nnx_value_and_grad_works_un_jitted_only():
    model = Nnx(nnx.Rngs(0))
    ours = vb.value_and_grad(nnx_loss, microbatch_size=4, grad_fn=nnx.value_and_grad)
    same(ours(model, batch()), nnx.value_and_grad(nnx_loss)(model, batch()))
    with pytest.raises(
        ValueError, match=r"module that was made outside.* Got TraceContextError: .*reseed"
    ):
        nnx.jit(ours)(model, batch())


def test_nnx_dropout_draws_from_a_key_argument():
    model = Nnx(nnx.Rngs(0))
    model.dropout.deterministic = False
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, batch, key):
        outputs = nnx.merge(graph, params, rest)(batch["x"], nnx.Rngs(key))
        return jnp.mean(outputs), outputs

    ours = jax.jit(vb.value_and_grad(loss, has_aux=True, key_argnum=2, microbatch_size=1))
    equal = batch() | {"x": np.ones((ROWS, 3), "float32")}
    (_, outputs), _ = ours(params, equal, jax.random.key(0))
    assert len(np.unique(np.asarray(outputs))) > ROWS / 2


class Equinox(eqx.Module):
    kernel: jax.Array
    scale: jax.Array
    activation: object

    def __init__(self):
        self.kernel = jax.random.normal(jax.random.key(0), (3, 1))
        self.scale = jnp.asarray(3)
        self.activation = jnp.tanh

    def __call__(self, x):
        return self.activation(x @ self.kernel) * self.scale


def equinox_loss(model, batch):
    return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)


# Without optimisation XLA computes tanh of other numbers of rows by other code.
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("jit", tiered([lambda f: f, eqx.filter_jit], [eqx.filter_jit], UN_JITTED))
def test_equinox_with_leaves_that_are_no_parameters(jit):
    model = Equinox()
    due = eqx.filter_value_and_grad(equinox_loss)(model, batch())
    options = {"microbatch_size": 4, "grad_fn": eqx.filter_value_and_grad}
    same(jit(vb.value_and_grad(equinox_loss, **options))(model, batch()), due)

    def aux(model, batch):
        return equinox_loss(model, batch), batch["y"]

    (value, rows), gradients = jit(vb.value_and_grad(aux, has_aux=True, **options))(model, batch())
    same((value, gradients), due)
    assert_close(rows, batch()["y"])

    def halves(model, batch):
        return dict.fromkeys("ab", equinox_loss(model, batch) / 2)

    def weight(batch):
        return dict.fromkeys("ab", len(batch["x"]))

    same(jit(vb.value_and_grad(halves, weight=weight, **options))(model, batch()), due)
    nothing = jit(vb.value_and_grad(equinox_loss, weight=lambda batch: 0.0, **options))
    same(nothing(model, batch()), jax.tree.map(jnp.zeros_like, due))


@pytest.mark.usefixtures("optimized")
@pytest.mark.thorough("a further way to use the framework")
def test_equinox_partition_and_combine():
    params, static = eqx.partition(Equinox(), eqx.is_inexact_array)

    def loss(params, batch):
        return equinox_loss(eqx.combine(params, static), batch)

    ours = jax.jit(vb.value_and_grad(loss, microbatch_size=4))
    same(ours(params, batch()), eqx.filter_value_and_grad(equinox_loss)(Equinox(), batch()))


@pytest.mark.parametrize("mode", JITTED)
def test_a_haiku_style_function(mode):
    # (params, state, rng, batch) -> (loss, state): what hk.transform_with_state gives.
    params = {"linear": {"w": np.ones((3, 1), "float32")}}

    def loss(params, state, rng, batch):
        kept = jax.random.bernoulli(rng, 0.5, batch["x"].shape)
        outputs = (batch["x"] * kept) @ params["linear"]["w"]
        return jnp.mean((outputs - batch["y"]) ** 2), (state | {"mean": batch["x"].mean(0)}, kept)

    ours = vb.value_and_grad(loss, has_aux=True, batch_argnum=3, key_argnum=2, microbatch_size=5)
    state, key = {"mean": np.zeros(3, "float32"), "updates": 0.0}, jax.random.key(0)
    (value, (new, kept)), gradients = in_mode(mode, ours)(params, state, key, batch())
    same(new["mean"], batch()["x"].mean(0))

    def due(params):
        outputs = (batch()["x"] * kept) @ params["linear"]["w"]
        return jnp.mean((outputs - batch()["y"]) ** 2)

    same((value, gradients), jax.value_and_grad(due)(params))


def test_optax_sees_one_update_per_window():
    # Schedule, clipping, decay and average of a chain, as if the batch were whole.
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.adamw(optax.piecewise_constant_schedule(0.1, {2: 0.1})),
        optax.ema(0.9),
    )

    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch["x"]) @ params - batch["y"]) ** 2)

    def train(gradients):
        @jax.jit
        def update(params, state, batch):
            found = gradients(params, batch)[1]
            changes, state = optimizer.update(found, state, params)
            return optax.apply_updates(params, changes), state

        params = jnp.ones((3, 1))
        state = optimizer.init(params)
        for _ in range(4):
            params, state = update(params, state, batch())
        return params, state

    ours = train(vb.value_and_grad(loss, microbatch_size=4))
    same(ours, train(jax.value_and_grad(loss)), summands=1000)
    assert int(ours[1][2].count) == 4


def spread(z):
    """A loss that needs all rows."""
    return jnp.std(z) + jnp.max(z)


# Without optimisation XLA computes tanh of other numbers of rows by other code.
@pytest.mark.usefixtures("optimized")
def test_rowwise_takes_equinox_modules():
    def encode(model, batch):
        return jax.vmap(model)(batch["x"])

    entries = vb.rowwise(encode, microbatch_size=4)
    due = eqx.filter_jit(eqx.filter_grad(lambda m: spread(encode(m, batch()))))(Equinox())
    same(eqx.filter_jit(eqx.filter_grad(lambda m: spread(entries(m, batch()))))(Equinox()), due)


def test_rowwise_takes_the_state_of_nnx():
    graph, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)

    def encode(params, batch, graph, rest):
        return nnx.merge(graph, params, rest, copy=True)(batch["x"])

    entries = vb.rowwise(encode, microbatch_size=5)
    found = jax.jit(jax.grad(lambda p: spread(entries(p, batch(), graph, rest))))(params)
    ends = [slice(0, 5), slice(5, 10)]
    halves = [jax.tree.map(lambda leaf, s=s: leaf[s], batch()) for s in ends]

    def by_hand(params):
        # BatchNorm takes the statistics of each micro-batch.
        return spread(jnp.concatenate([encode(params, half, graph, rest) for half in halves]))

    same(found, jax.jit(jax.grad(by_hand))(params))


def test_rowwise_refuses_modules_that_change():
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    outside = vb.rowwise(lambda scale, batch: norm(batch["x"]) * scale, microbatch_size=5)
    with pytest.raises(ValueError, match=r"module that was made outside.* Got TraceContextError"):
        jax.jit(outside)(1.0, batch())
    inside = vb.rowwise(lambda norm, batch: norm(batch["x"]), microbatch_size=5)
    with pytest.raises(ValueError, match=r"must not change .* Got a change of .*\.mean"):
        nnx.jit(inside)(norm, batch())
