"""`rowwise`: functions of rows whose loss needs all of them, and whatever differentiates that."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tests.jax.problems import MODES, assert_same, in_mode
from tests.tiers import tiered

import virtualbatch
import virtualbatch.jax as vb

ROWS = 7
RANDOM = np.random.default_rng(3)
PARAMS = {"a": RANDOM.normal(size=(4, 3)), "b": RANDOM.normal(size=(4, 3))}
PARAMS["scale"] = np.asarray(0.7)
BATCH = {"x": RANDOM.normal(size=(ROWS, 4)), "y": RANDOM.normal(size=(ROWS, 4))}


def first(params, batch):
    return jnp.tanh(batch["x"] @ params["a"])


def second(params, batch):
    return jnp.tanh(batch["y"] @ params["b"])


def both(params, batch):
    return first(params, batch), second(params, batch)


def unit(z):
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def clip(z, w, scale):
    logits = jnp.exp(scale) * unit(z) @ unit(w).T
    rows, columns = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits.T)
    return -jnp.diag(rows).mean() - jnp.diag(columns).mean()


def loss(encode):
    return lambda params, batch: clip(*encode(params, batch), params["scale"])


def of_two(params, batch):
    """Two encoders, with sizes of their own."""
    a, b = vb.rowwise(first, microbatch_size=2), vb.rowwise(second, microbatch_size=3)
    return clip(a(params, batch), b(params, batch), params["scale"])


def in_blocks(params, batch):
    """The loss in blocks of rows, so that it never has all logits at once."""

    def cross_entropy(given, rows):
        columns, scale = given
        z, index = rows
        own = jax.nn.log_softmax(jnp.exp(scale) * z @ columns.T)
        return -jnp.take_along_axis(own, index[:, None], 1)[:, 0]

    z, w = map(unit, vb.rowwise(both, microbatch_size=3)(params, batch))
    block, index = vb.rowwise(cross_entropy, microbatch_size=2), jnp.arange(ROWS)
    rows, columns = (z, index), (w, index)
    scale = params["scale"]
    return block((w, scale), rows).mean() + block((z, scale), columns).mean()


def chained(params, batch):
    """The outputs of one are the rows of another."""
    square = vb.rowwise(lambda p, z: (z * p["scale"]) ** 2, microbatch_size=3)
    z, w = vb.rowwise(both, microbatch_size=2)(params, batch)
    return clip(square(params, z), w, params["scale"])


def chained_uncut(params, batch):
    z, w = both(params, batch)
    return clip((z * params["scale"]) ** 2, w, params["scale"])


CASES = {
    "two encoders": (of_two, loss(both)),
    "loss in blocks": (in_blocks, loss(both)),
    "chained": (chained, chained_uncut),
}


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same rules, one by one"))
@pytest.mark.parametrize("name", tiered(CASES, ["loss in blocks", "chained"], "a plainer case"))
def test_exact_in_parameters_and_rows(mode, name):
    ours, uncut = CASES[name]
    found = in_mode(mode, jax.value_and_grad(ours, (0, 1)))(PARAMS, BATCH)
    assert_same(found, jax.jit(jax.value_and_grad(uncut, (0, 1)))(PARAMS, BATCH))


def hessian_vector(fun, params, batch):
    return jax.jvp(jax.grad(lambda p: fun(p, batch)), (params,), (params,))[1]


def models(fun, params, batch):
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    return jax.vmap(jax.grad(fun), (0, None))(several, batch)


TRANSFORMATIONS = {"hessian_vector": hessian_vector, "models": models}


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same rules, one by one"))
@pytest.mark.parametrize(
    "name", tiered(TRANSFORMATIONS, ["hessian_vector"], "a further transformation")
)
def test_every_transformation_goes_through(mode, name):
    transformed = TRANSFORMATIONS[name]
    ours = loss(vb.rowwise(both, microbatch_size=3))
    params = jax.tree.map(jnp.asarray, PARAMS)
    found = in_mode(mode, lambda p, b: transformed(ours, p, b))(params, BATCH)
    assert_same(found, jax.jit(lambda p, b: transformed(loss(both), p, b))(params, BATCH))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "traces"), [(2, 2), (7, 1)])
def test_fn_is_traced_once_for_each_number_of_rows(mode, size, traces):
    # 2, 2, 2 and 1; or uncut.
    seen = []

    def counted(params, batch):
        seen.append(len(batch["x"]))
        return both(params, batch)

    ours = in_mode(mode, jax.grad(loss(vb.rowwise(counted, microbatch_size=size, check=False))))
    ours(PARAMS, BATCH)
    assert len(seen) == len(set(seen)) == traces
    if mode == "jit":
        ours(PARAMS, BATCH)
        assert len(seen) == traces


def test_equal_micro_batches_are_traced_for_twice_as_many_rows_too():
    seen = []

    def counted(params, x):
        seen.append(len(x))
        return x * params

    ours = vb.rowwise(counted, microbatch_size=2)
    jax.jit(jax.grad(lambda p: ours(p, jnp.arange(8.0)).sum()))(1.0)
    assert sorted(seen) == [2, 4]


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "hundreds of micro-batches, one by one"))
def test_half_precision_is_added_up_in_float32(mode):
    # Added in bfloat16, 1 and 1 and so on stay at 256.
    rows = 1024 if mode == "jit" else 320
    ours = vb.rowwise(lambda p, x: p * x, microbatch_size=1)
    x = jnp.ones(rows, jnp.bfloat16)
    run = in_mode(mode, jax.grad(lambda p: ours(p, x).astype(jnp.float32).sum()))
    found = run(jnp.ones((), jnp.bfloat16))
    assert (float(found), found.dtype) == (rows, jnp.bfloat16)


def dropped(params, batch, key):
    z = first(params, batch)
    return z * jax.random.bernoulli(key, 0.7, z.shape)


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same keys, one by one"))
def test_keys_are_those_of_the_micro_batches(mode):
    key, ends = jax.random.key(5), [(0, 3), (3, 6), (6, 7)]
    if mode == "eager":
        # Even ones, as in every un-jitted window.
        ends = [(0, 3), (3, 5), (5, 7)]

    def by_hand(params):
        cut = [jax.tree.map(lambda x, a=a, b=b: x[a:b], BATCH) for a, b in ends]
        keys = [jax.random.fold_in(key, k) for k in range(3)]
        return jnp.concatenate([dropped(params, *p) for p in zip(cut, keys, strict=True)]).std()

    ours = vb.rowwise(dropped, microbatch_size=3, key_argnum=2)
    found = in_mode(mode, jax.grad(lambda p: ours(p, BATCH, key).std()))(PARAMS)
    assert_same(found, jax.jit(jax.grad(by_hand))(PARAMS))


@pytest.mark.parametrize("mode", MODES)
def test_outputs_of_every_kind_in_order_of_rows(mode):
    def many(params, batch):
        number = batch["number"]
        return {
            "z": batch["x"] @ params["a"],
            "integer": number,
            "boolean": number > 3,
            "none": None,
            "complex": number * 1j,
            "key": jax.vmap(jax.random.key)(number),
        }

    batch = {"x": BATCH["x"], "number": np.arange(ROWS)}
    found = in_mode(mode, vb.rowwise(many, microbatch_size=3))(PARAMS, batch)
    due = many(PARAMS, batch)
    assert jax.tree.structure(found) == jax.tree.structure(due)
    assert (jax.random.key_data(found.pop("key")) == jax.random.key_data(due.pop("key"))).all()
    assert_same(found, due)


REFUSED = {
    "mean": (lambda p, x: {"mean": x.mean(0)}, r"one entry per row\. Got output\['mean'\] with"),
    "number": (lambda p, x: x.sum(), r"one entry per row\. Got output with shape \(\)"),
    "constant": (lambda p, x: (x, 3.0), r"or None\. Got output\[1\] of type float"),
    "joined": (lambda p, x: jnp.concatenate([x, x]), "Return the 2 views as outputs of their own"),
    "coincidence": (lambda p, x: x[:, :2].mean(0), r"Got output with shape \(2,\) for 4 rows"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_outputs_that_are_not_those_of_rows_are_refused(mode, name):
    fn, text = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=text):
        in_mode(mode, vb.rowwise(fn, microbatch_size=2, check=False))(1.0, np.ones((6, 4)))


@pytest.mark.parametrize("mode", MODES)
def test_a_structure_that_changes_is_refused(mode):
    def changing(params, x):
        return (x,) if len(x) == 2 else {"z": x}

    with pytest.raises(ValueError, match=r"Got output\[0\], and later output\['z'\]"):
        in_mode(mode, vb.rowwise(changing, microbatch_size=2, check=False))(1.0, np.ones((5, 4)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fn": None, "microbatch_size": 2}, "fn must be a function"),
        ({"microbatch_size": 0}, "must be a positive integer"),
        ({"microbatch_size": 2, "key_argnum": 1}, "batch_argnum and key_argnum must be different"),
    ],
)
def test_options_that_no_call_can_satisfy(options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        vb.rowwise(**{"fn": first} | options)


def test_float8_state_is_refused():
    params = {"_overwrite_with_gradient": jnp.ones(3)}
    ours = vb.rowwise(lambda p, x: x, microbatch_size=2)
    with pytest.raises(ValueError, match=r"no gradients but new values\. Got \[0\]\[0\]\['_over"):
        ours(params, jnp.ones(4))


@pytest.mark.parametrize("mode", MODES)
def test_windows_are_taken_as_they_are(mode):
    parts = [(0, 2), (2, 4), (4, 5), (5, 7)]
    window = vb.Window([jax.tree.map(lambda x, a=a, b=b: x[a:b], BATCH) for a, b in parts])
    found = in_mode(mode, jax.value_and_grad(loss(vb.rowwise(both))))(PARAMS, window)
    assert_same(found, jax.value_and_grad(loss(both))(PARAMS, BATCH))


def test_rows_of_a_packed_window_come_back_by_their_numbers():
    lengths = np.array([3, 1, 4, 2, 2])
    tokens = RANDOM.normal(size=(5, 4)) * (np.arange(4) < lengths[:, None])
    given, padded = {"x": tokens, "row": np.arange(5)}, {"x": True, "row": False}
    packed = virtualbatch.pack(given, lengths, microbatch_tokens=6, padded=padded)

    def encode(w, batch):
        return jnp.tanh(batch["x"].sum(1) * w), batch["row"]

    def total(w):
        z, rows = vb.rowwise(encode)(w, packed)
        z = jnp.zeros(5).at[rows].set(z)
        return z[0] * z[1] * z[2] + z[3] ** z[4]

    def uncut(w):
        z = jnp.tanh(jnp.asarray(tokens).sum(1) * w)
        return z[0] * z[1] * z[2] + z[3] ** z[4]

    found, due = (jax.jit(jax.value_and_grad(fun))(0.7) for fun in (total, uncut))
    assert_same(found, due)


def test_lists_of_rows_are_cut_un_jitted():
    names = [f"n{k}" for k in range(ROWS)]

    def encode(params, batch):
        factor = jnp.array([float(name[1:]) for name in batch["names"]])
        return first(params, batch) * factor[:, None]

    batch = BATCH | {"names": names}
    found = jax.grad(lambda p: vb.rowwise(encode, microbatch_size=3)(p, batch).std())(PARAMS)
    assert_same(found, jax.grad(lambda p: encode(p, batch).std())(PARAMS))


def test_several_arguments_hold_rows():
    def encode(x, params, y, *, factor):
        return x @ params["a"] * factor, y @ params["b"]

    ours = vb.rowwise(encode, batch_argnum=(0, 2), microbatch_size=3)
    given = BATCH["x"], PARAMS, BATCH["y"]
    assert_same(jax.jit(ours)(*given, factor=2.0), encode(*given, factor=2.0))


def convolved(params, x):
    for kernel in params["kernels"]:
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jnp.tanh(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers))
    return x.mean((1, 2)) @ params["head"], jnp.arange(len(x))


def test_convolutions_go_through_loops_of_our_own():
    kernels = [RANDOM.normal(size=(3, 3, 2, 2)) for _ in range(2)]
    params = {"kernels": kernels, "head": RANDOM.normal(size=(2, 3)), "frozen": np.arange(3)}
    x, factor = RANDOM.normal(size=(ROWS, 4, 4, 2)), jnp.asarray(0.9)

    def total(encode):
        # A value that fn closes over, the rows, and not the integers among the parameters.
        def run(floating, x, factor):
            given = params | floating
            z, _ = encode(lambda p, x: convolved(p, x * factor))(given, x)
            return clip(z, z[::-1] * 2, 0.3)

        return run

    ours = total(lambda fn: vb.rowwise(fn, microbatch_size=3))
    floating = {name: params[name] for name in ("kernels", "head")}
    given = floating, x, factor
    found = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(*given)
    due = jax.jit(jax.value_and_grad(total(lambda fn: fn), (0, 1, 2)))(*given)
    assert_same(found, due)
    # Without a remainder all convolutions are in loops, and there in the order of the fast kernel.
    text = jax.jit(jax.grad(ours)).lower(floating, x[:6], factor).as_text()
    orders = set(re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", text))
    assert orders == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda *given: jax.jvp(ours, given, given))(*given)


@pytest.mark.usefixtures("optimized")
def test_temporaries_do_not_grow_with_the_batch():
    def temporaries(steps):
        rows = 4 * steps
        batch = {"x": jnp.ones((rows, 64))}
        params = {"a": jnp.ones((64, 256)), "b": jnp.ones((256, 2))}

        def encode(params, batch):
            return jnp.tanh(jnp.tanh(batch["x"] @ params["a"]) @ params["b"])

        def total(params, batch):
            z = vb.rowwise(encode, microbatch_size=4)(params, batch)
            block = vb.rowwise(lambda w, z: jax.nn.logsumexp(z @ w.T, 1), microbatch_size=4)
            return block(z, z).mean()

        compiled = jax.jit(jax.value_and_grad(total)).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes, rows * 2 * 8

    (few, outputs), (many, more_outputs) = temporaries(4), temporaries(64)
    # The outputs, and their gradient of either use.
    assert many - 3 * more_outputs <= 1.02 * (few - 3 * outputs)


def test_a_smaller_size_where_memory_runs_out(caplog):
    seen = []

    def encode(params, x):
        seen.append(len(x))
        if len(x) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9.")
        return x * params

    ours = vb.rowwise(encode, microbatch_size=4)
    found = jax.grad(lambda p: (ours(p, jnp.arange(8.0)) ** 2).sum())(3.0)
    assert (float(found), seen) == (840.0, [4, 2])
    assert "micro-batches of 2 rows, which are kept" in caplog.text
    ours(3.0, jnp.arange(8.0))
    assert seen == [4, 2, 2]


@pytest.mark.usefixtures("untimed_plans")
@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the same plan"))
def test_a_size_is_planned(mode):
    seen = []

    def encode(p, x):
        seen.append(len(x))
        return jnp.tanh(jnp.tanh(x @ p) @ p.T)

    ours = vb.rowwise(encode, microbatch_size=virtualbatch.Auto(memory_limit="600KiB"))
    x, p = RANDOM.normal(size=(512, 64)), RANDOM.normal(size=(64, 64))
    found = in_mode(mode, jax.grad(lambda p: ours(p, x).std()))(p)
    # The last trace is of what was run.
    assert seen[-1] < 512
    assert_same(found, jax.jit(jax.grad(lambda p: encode(p, x).std()))(p))


PROVEN = {
    "centred": (lambda p, x: (x - x.mean(0)) * p, False),
    "sorted": (lambda p, x: jnp.sort(x * p, 0), False),
    "running": (lambda p, x: jnp.cumsum(x, 0), False),
    "integers": (lambda p, x: jnp.argsort(x[:, 0] * p), False),
    "rows": (lambda p, x: jnp.tanh(x * p), True),
}


@pytest.mark.proves_itself
@pytest.mark.parametrize("name", tiered(PROVEN, ["rows"], "certificates, one by one"))
def test_the_first_call_proves_that_rows_stand_alone(name, caplog):
    fn, is_right = PROVEN[name]
    ours, x = vb.rowwise(fn, microbatch_size=4), RANDOM.normal(size=(12, 4))
    if is_right:
        ours(2.0, jnp.asarray(x))
        assert not caplog.records
        return
    with pytest.raises(ValueError, match=r"^What rowwise wraps .*: coupled_rows at .*check=False"):
        jax.vjp(lambda p: ours(p, x), 2.0)
    # Under a trace nothing can be read.
    jax.jit(ours)(2.0, x)


@pytest.mark.proves_itself
def test_a_function_is_tried_once():
    seen = []

    def encode(params, x):
        seen.append(len(x))
        return x * params

    ours = vb.rowwise(encode, microbatch_size=4)
    for _ in range(2):
        ours(2.0, jnp.ones((12, 2)))
    assert seen == [3, 7, 4, 4, 4]


def test_certify_takes_the_function():
    found = vb.certify(vb.rowwise(first, microbatch_size=4))(PARAMS, BATCH)
    assert found.exact
    assert set(found.parameters) == {
        "['params']['a']",
        "['params']['b']",
        "['params']['scale']",
        "['the outputs']",
    }
    centred = vb.rowwise(lambda params, x: x * params - x.mean(), microbatch_size="auto")
    with pytest.raises(ValueError, match=r"needs a size\. Got .*'auto'"):
        vb.certify(centred)
    with pytest.raises(ValueError, match="brings its own options"):
        vb.certify(centred, weight="sum", microbatch_size=2)
    found = vb.certify(centred, microbatch_size=2)(2.0, np.arange(6.0))
    assert [finding.kind for finding in found.findings] == ["coupled_rows"]
