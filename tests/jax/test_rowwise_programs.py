"""The programs that `rowwise` makes: how often fn is traced, its dtypes, loops and memory."""

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

RANDOM = np.random.default_rng(3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "traces"), [(2, 2), (7, 1)])
def test_fn_is_traced_once_for_each_number_of_rows(mode, size, traces):
    # 2, 2, 2 and 1; or uncut.
    seen = []

    def counted(params, x):
        seen.append(len(x))
        return x * params

    ours = vb.rowwise(counted, microbatch_size=size, check=False)
    gradient = in_mode(mode, jax.grad(lambda p: ours(p, jnp.arange(7.0)).sum()))
    assert gradient(1.0) == 21.0
    assert len(seen) == len(set(seen)) == traces
    if mode == "jit":
        gradient(1.0)
        assert len(seen) == traces


def test_equal_micro_batches_are_traced_for_twice_as_many_rows_too():
    seen = []

    def counted(params, x):
        seen.append(len(x))
        return x * params

    ours = vb.rowwise(counted, microbatch_size=2)
    jax.jit(jax.grad(lambda p: ours(p, jnp.arange(8.0)).sum()))(1.0)
    assert sorted(seen) == [2, 4]


WAYS = {
    "argument": lambda p, x: vb.rowwise(lambda p, x: p * x, microbatch_size=1)(p, x),
    "closure": lambda p, x: vb.rowwise(lambda x: p * x, microbatch_size=1, batch_argnum=0)(x),
}


@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "hundreds of micro-batches, one by one"))
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_is_added_up_in_float32(mode, way):
    # Added in bfloat16, 1 and 1 and so on stay at 256.
    rows = 1024 if mode == "jit" else 264
    x = jnp.ones(rows, jnp.bfloat16)
    run = in_mode(mode, jax.grad(lambda p: WAYS[way](p, x).astype(jnp.float32).sum()))
    found = run(jnp.ones((), jnp.bfloat16))
    assert (float(found), found.dtype) == (rows, jnp.bfloat16)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_of_python_do_not_widen_rows(mode):
    ours = vb.rowwise(lambda factor, x: factor * x, microbatch_size=2)
    assert in_mode(mode, ours)(2.0, jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16


def convolved(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jnp.tanh(lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", None, None, numbers))
    return x.mean((1, 2)), jnp.arange(len(x))


def test_convolutions_go_through_loops_of_our_own():
    params = {"kernel": RANDOM.normal(size=(2, 2, 2, 2)), "frozen": np.arange(3)}
    x, factor = RANDOM.normal(size=(6, 3, 3, 2)), jnp.asarray(0.9)

    def total(encode):
        # A value that fn closes over, the rows, and not the integers among the parameters; what
        # runs it again, and no gradient of one output.
        @jax.checkpoint
        def run(kernel, x, factor):
            given = params | {"kernel": kernel}
            z, _ = encode(lambda p, x: convolved(p, x * factor))(given, x)
            return jnp.std(z @ z[::-1].T)

        return run

    ours = total(lambda fn: vb.rowwise(fn, microbatch_size=3))
    given = params["kernel"], x, factor
    lowered = jax.jit(jax.value_and_grad(ours, (0, 1, 2))).lower(*given)
    due = jax.jit(jax.value_and_grad(total(lambda fn: fn), (0, 1, 2)))(*given)
    assert_same(lowered.compile()(*given), due)
    # In the loops, in the order of the fast kernel.
    orders = set(re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", lowered.as_text()))
    assert orders == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda *given: jax.jvp(ours, given, given))(*given)


@pytest.mark.usefixtures("optimized")
def test_temporaries_do_not_grow_with_the_batch():
    def temporaries(steps):
        rows = 4 * steps

        def encode(params, x):
            return jnp.tanh(x @ params).reshape(len(x), 2, -1).sum(2)

        def total(params, x):
            return jnp.std(vb.rowwise(encode, microbatch_size=4)(params, x))

        given = jnp.ones((64, 256)), jnp.ones((rows, 64))
        compiled = jax.jit(jax.grad(total)).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes, rows * 2 * 8

    (few, outputs), (many, more_outputs) = temporaries(4), temporaries(64)
    # The outputs and their gradient.
    assert many - 2 * more_outputs <= 1.02 * (few - 2 * outputs)


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
        return jnp.tanh(x * p)

    ours = vb.rowwise(encode, microbatch_size=virtualbatch.Auto(memory_limit="80KiB"))
    x = RANDOM.normal(size=(64, 64))
    found = in_mode(mode, jax.grad(lambda p: (ours(p, x) ** 2).sum() / 2))(0.5)
    # The last trace is of what was run.
    assert seen[-1] < 64
    z = np.tanh(x * 0.5)
    assert_same(found, jnp.asarray((z * x * (1 - z**2)).sum()))
