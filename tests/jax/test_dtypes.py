"""Half precision: sums in float32, one rounding at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import MODES, assert_same, batch, in_mode, loss, params
from tests.oracle import EXACT, assert_close, tolerance
from tests.tiers import tiered

import virtualbatch.jax as vb

B = batch()
NAMES = ["bfloat16", "float16", "float32", "float64"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("of_params", tiered(NAMES, ["bfloat16", "float32"], "further pairs"))
@pytest.mark.parametrize("of_loss", tiered(NAMES, ["float16", "float64"], "further pairs"))
def test_every_pair_of_dtypes(of_loss, of_params, mode):
    def fun(params, batch):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        return loss(wide, batch).astype(of_loss)

    found = params(jnp.dtype(of_params))
    value, gradients = in_mode(mode, vb.value_and_grad(fun, microbatch_size=4))(found, B)
    assert value.dtype == of_loss
    assert {str(g.dtype) for g in jax.tree.leaves(gradients)} == {of_params}
    due = jax.value_and_grad(loss)(jax.tree.map(lambda x: x.astype(np.float64), found), B)
    # Each micro-batch's result is rounded once, the sum once more.
    narrow = max((of_loss, of_params), key=lambda name: tolerance(name, 1))
    allowed = EXACT if narrow == "float64" else tolerance(narrow, 10)
    for a, b in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves(due), strict=True):
        assert_close(a, b, allowed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_thousand_micro_batches_of_gradient_1_give_1(dtype, mode):
    # A sum in bfloat16 stops at 256.
    rows = 1024 if mode == "jit" else 300
    ours = in_mode(mode, vb.value_and_grad(lambda w, x: (w * x).mean(), microbatch_size=1))
    value, gradient = ours(jnp.ones((), dtype), jnp.ones(rows, dtype))
    assert (value.dtype, gradient.dtype) == (dtype, dtype)
    assert (float(value), float(gradient)) == (1.0, 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_share_does_not_go_through_the_backward_pass_in_half_precision(mode):
    # A share of 1/3 is off by 0.2 % in bfloat16; three times that sum would not be 1.
    ours = in_mode(
        mode,
        vb.value_and_grad(
            lambda w, batch: {"a": (w * batch).mean(), "b": (w * batch).mean() * 0},
            microbatch_size=1,
            weight=lambda batch: {"a": 1, "b": jnp.abs(batch).sum()},
        ),
    )
    _, gradient = ours(jnp.ones((), "bfloat16"), jnp.ones(3, "bfloat16"))
    assert float(gradient) == 1.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float32, np.dtype("float64")])
def test_accumulator_dtype(dtype, mode):
    found = params()
    ours = in_mode(mode, vb.value_and_grad(loss, microbatch_size=4, accumulator_dtype=dtype))
    value, gradients = ours(found, B)
    due_value, due = jax.value_and_grad(loss)(found, B)
    assert_same(value, due_value)
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float64")}
    off = max(float(jnp.abs(gradients[name] - due[name]).max()) for name in due)
    largest = max(float(jnp.abs(x).max()) for x in due.values())
    assert off <= max(EXACT, tolerance(str(jnp.dtype(dtype)), 10)) * largest
    assert (off > EXACT) == (jnp.dtype(dtype) != np.float64)
