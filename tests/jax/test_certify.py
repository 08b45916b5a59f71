"""certify on JAX: no false alarm, the right cause and line, and random bits kept by row."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tests.tiers import tiered

import virtualbatch.jax as vb

ROWS, CLASSES = 22, 5
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(ROWS, 8)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, CLASSES, ROWS))
MASK = jnp.asarray(np.arange(6) < 2 + np.arange(ROWS)[:, None] % 5, jnp.float32)
PARAMS = {
    "first": jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32),
    "last": jnp.asarray(RNG.normal(size=(16, CLASSES)), jnp.float32),
}


def hidden(params, x):
    return jax.nn.relu(x @ params["first"])


def crossentropy(logits, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def classifier(params, batch):
    return crossentropy(hidden(params, batch[0]) @ params["last"], batch[1])


def dropout(params, batch, key):
    h = hidden(params, batch[0])
    h = jnp.where(jax.random.bernoulli(key, 0.5, h.shape), 2 * h, 0)
    return crossentropy(h @ params["last"], batch[1])


def noise_of_weights(params, batch, key):
    noise = jax.random.normal(key, params["last"].shape)
    return crossentropy(hidden(params, batch[0]) @ (params["last"] + 0.1 * noise), batch[1])


def masked(params, batch):
    squares = (hidden(params, batch["x"]) ** 2).mean(1, keepdims=True)
    return (squares * batch["mask"]).sum() / batch["mask"].sum()


def recurrent(params, batch):
    def step(h, x):
        h = jnp.tanh(h @ params["last"][:CLASSES] + x[:, :CLASSES])
        return h, h

    start = jnp.zeros((len(batch), CLASSES), batch.dtype)
    _, found = jax.lax.scan(step, start, jnp.stack([batch, batch * 2]))
    return (found**2).mean()


def own_float32(params, batch):
    def step(h, x):
        return jnp.tanh(h + (x @ params["first"]).astype(jnp.float32)), None

    start = jnp.zeros((len(batch), 16), jnp.float32)
    h, _ = jax.lax.scan(step, start, jnp.stack([batch, batch * 2]))
    return (h @ params["last"] ** 2).mean()


def of_terms(params, batch):
    return {
        "a": classifier(params, batch),
        "b": masked(params, {"x": batch[0], "mask": batch[2]}),
        "decay": 1e-2 * sum((p**2).sum() for p in params.values()),
    }


TERMS = {"a": lambda b: len(b[0]), "b": lambda b: b[2].sum(), "decay": lambda b: None}

# name -> (function, options, arguments after the parameters)
CORRECT = {
    "MLP": (classifier, {}, [(X, Y)]),
    "jitted": (jax.jit(classifier), {}, [(X, Y)]),
    "dropout": (dropout, {"key_argnum": 2}, [(X, Y), jax.random.key(1)]),
    "jitted dropout": (jax.jit(dropout), {"key_argnum": 2}, [(X, Y), jax.random.key(1)]),
    "noise without rows": (noise_of_weights, {}, [(X, Y), jax.random.PRNGKey(1)]),
    "mask": (masked, {"weight": lambda b: b["mask"].sum()}, [{"x": X, "mask": MASK}]),
    "scan": (recurrent, {}, [X]),
    "its own float32": (own_float32, {}, [X]),
    "remat": (jax.checkpoint(classifier), {}, [(X, Y)]),
    "terms": (of_terms, {"weight": lambda b: {k: f(b) for k, f in TERMS.items()}}, [(X, Y, MASK)]),
    "aux": (lambda p, b: (classifier(p, b), b[0]), {"has_aux": True}, [(X, Y)]),
    "a named buffer": (classifier, {"accumulator_dtype": jnp.float32}, [(X, Y)]),
}


@pytest.mark.parametrize("name", tiered(CORRECT, ["mask", "scan"], "further correct losses"))
def test_no_false_alarm(name):
    fun, options, given = CORRECT[name]
    found = vb.certify(fun, microbatch_size=7, **options)(PARAMS, *given)
    assert found.findings == (), found
    assert found.exact
    assert set(found.parameters) == {"['first']", "['last']"}


def test_random_bits_are_kept_by_row():
    fun, options, given = CORRECT["dropout"]
    found = vb.certify(fun, microbatch_size=7, **options)(PARAMS, *given)
    assert any("kept its random numbers" in note for note in found.notes)
    assert not any("draw the same ones" in note for note in found.notes)
    assert found.max_error < 1e-14


def test_numbers_that_all_micro_batches_would_draw_alike():
    def frozen(params, x):
        kept = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
        return ((x * kept) @ params["first"]).mean()

    found = vb.certify(frozen, microbatch_size=7)(PARAMS, X)
    assert any("no key_argnum is given: in training all" in note for note in found.notes)


def normalised(params, x):
    h = x @ params["first"]
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
    return (h @ params["last"]).mean()


def contrastive(params, x):
    z = hidden(params, x)
    return -jnp.diag(jax.nn.log_softmax(z @ z.T)).mean()


def regularised_mean(params, x):
    h = hidden(params, x) @ params["last"]
    return (h**2).mean() + h.mean() ** 2


def summed(params, x):
    return (hidden(params, x) @ params["last"] ** 2).sum()


def sum_and_decay(params, x):
    return summed(params, x) + sum((p**2).sum() for p in params.values())


def logarithm(params, x):
    return jnp.log(hidden(params, x) @ params["last"]).mean()


def square_root(params, x):
    return jnp.sqrt(jnp.sum(0 * hidden(params, x) @ params["last"], 1)).mean()


MASKED = {"x": X, "mask": MASK}
LINES = "test_certify.py:"
# name -> (function, options, batch, kind, text of where, text of why or fix)
WRONG = {
    "mask by rows": (masked, {}, MASKED, "weight", LINES, "batch['mask'].sum()"),
    "rows by mask": (
        lambda p, b: (hidden(p, b["x"]) ** 2).mean(),
        {"weight": lambda b: b["mask"].sum()},
        MASKED,
        "weight",
        LINES,
        "Leave weight out",
    ),
    "a sum": (summed, {}, X, "sum_loss", LINES, 'weight="sum"'),
    "a sum and decay": (sum_and_decay, {}, X, "regulariser", LINES, "None for the regulariser"),
    "normalised": (normalised, {}, X, "coupled_rows", LINES, "row"),
    "contrastive": (contrastive, {}, X, "coupled_rows", LINES, "row"),
    "regularised mean": (regularised_mean, {}, X, "coupled_rows", LINES, "row"),
    "a narrow buffer": (
        classifier,
        {"accumulator_dtype": jnp.bfloat16},
        (X, Y),
        "low_precision",
        "accumulator_dtype=bfloat16",
        "float32",
    ),
    "logarithm": (logarithm, {}, X, "non_finite", LINES, "first to compute"),
    "square root": (square_root, {}, X, "non_finite", "the backward pass", "square root"),
    "NaN": (
        lambda p, x: summed(p, x) / len(x),
        {},
        X.at[3, 1].set(jnp.nan),
        "non_finite",
        "batch, row 3",
        "Clean",
    ),
}


@pytest.mark.parametrize(
    "name",
    tiered(
        WRONG,
        ["mask by rows", "a sum", "a sum and decay", "normalised", "a narrow buffer", "logarithm"],
        "further losses of the same kinds",
    ),
)
def test_the_cause_and_the_line_are_named(name):
    fun, options, batch, kind, where, text = WRONG[name]
    found = vb.certify(fun, microbatch_size=4, **options)(PARAMS, batch)
    assert not found.exact
    assert [finding.kind for finding in found.findings] == [kind], found
    assert where in found.findings[0].where
    assert text in found.findings[0].why + found.findings[0].fix


@pytest.mark.parametrize("kept", [2**28, 0], ids=["whole", "sketched"])
def test_the_line_is_the_one_that_couples_rows(kept, monkeypatch):
    monkeypatch.setattr("virtualbatch.certify.activations._KEPT_BYTES", kept)
    found = vb.certify(normalised, microbatch_size=4)(PARAMS, X)
    line = normalised.__code__.co_firstlineno + 2
    assert found.findings[0].where == f"{LINES}{line}"


@pytest.mark.thorough("compiles every operation of a network of flax")
def test_batch_norm_of_flax_is_named():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x)))

    net = Net()
    variables = net.init(jax.random.key(0), X)

    def loss(params, x):
        given = variables | {"params": params}
        return (net.apply(given, x, mutable=["batch_stats"])[0] ** 2).mean()

    found = vb.certify(loss, microbatch_size=8)(variables["params"], X)
    assert [finding.kind for finding in found.findings] == ["batchnorm"]
    assert "Net/BatchNorm_0" in found.findings[0].where


def test_several_arguments_are_named():
    def loss(a, batch, b):
        return (jnp.tanh(batch @ a) @ b).mean()

    found = vb.certify(loss, argnums=(0, 2), microbatch_size=5)(PARAMS["first"], X, PARAMS["last"])
    assert found.exact
    assert set(found.parameters) == {"[0]", "[1]"}


def test_a_loop_that_draws_is_refused():
    def loss(params, x, key):
        def step(total, key):
            return total + jax.random.normal(key, (len(x),)), None

        noise, _ = jax.lax.scan(step, jnp.zeros(len(x), x.dtype), jax.random.split(key, 3))
        return (hidden(params, x).sum(1) + noise).mean()

    with pytest.raises(ValueError, match="which it cannot do inside a loop"):
        vb.certify(loss, microbatch_size=4, key_argnum=2)(PARAMS, X, jax.random.key(0))


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (6, 6), (6, 9)])
def test_nothing_to_compare_is_refused(rows, size):
    with pytest.raises(ValueError, match=f"Got {rows} rows in one"):
        vb.certify(summed, microbatch_size=size)(PARAMS, X[:rows])


def test_traced_calls_and_windows_are_refused():
    run = vb.certify(summed, microbatch_size=4)
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(lambda x: run(PARAMS, x).max_error)(X)
    with pytest.raises(ValueError, match="Window"):
        run(PARAMS, vb.Window([X[:4], X[4:]]))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_x64_is_as_it_was(before, fails):
    seen = []

    def fun(params, x):
        seen.append(jax.config.jax_enable_x64)
        if fails:
            raise KeyError("theirs")
        return (hidden(params, x) ** 2).mean()

    with jax.enable_x64(before):
        with pytest.raises(KeyError) if fails else nullcontext():
            vb.certify(fun, microbatch_size=4)(PARAMS, X)
        assert jax.config.jax_enable_x64 == before
    assert set(seen) == {True}
    assert PARAMS["first"].dtype == jnp.float32
