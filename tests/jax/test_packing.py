"""Packed windows in JAX: the gradient of the padded batch, by few programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests import packed
from tests.oracle import EXACT, assert_all_close, tolerance
from tests.packed import LENGTH, MICROBATCH_TOKENS, ROWS, SUMMANDS

import virtualbatch.jax as vb
from virtualbatch import pack


def problem(dtype):
    """(functions, parameters, batch) in a dtype of floats."""
    functions = packed.Functions(
        jnp.einsum, jax.nn.softmax, lambda table, ids: table[ids], lambda x: x.astype(dtype)
    )
    arrays = [packed.parameters(dtype), packed.batch(dtype)]
    return functions, *jax.tree.map(jnp.asarray, arrays)


def tokens(batch):
    return (batch["ids"] != 0).sum()


def padded(loss):
    """Loss and gradients of the whole padded batch in float64."""
    functions, params, batch = problem("float64")
    return jax.tree.leaves(jax.value_and_grad(partial(loss, functions))(params, batch))


MODES = ["compiled loss", "compiled window"]
MORE_SHAPES = pytest.mark.thorough("without rounding, more shapes are compiled")
OPERATIONS = pytest.mark.thorough("un-jitted, each shape compiles every operation")


@pytest.mark.parametrize(
    ("mode", "round_to"),
    [
        *((mode, 4) for mode in MODES),
        *(pytest.param(mode, None, marks=MORE_SHAPES) for mode in MODES),
        pytest.param("eager", 4, marks=OPERATIONS),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        ("float64", EXACT),
        pytest.param("float32", None, marks=pytest.mark.thorough("a further dtype")),
    ],
)
def test_the_gradient_is_that_of_the_padded_batch(mode, round_to, dtype, rtol):
    functions, params, batch = problem(dtype)
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS, round_to=round_to)
    loss = partial(packed.token_loss, functions)
    ours = vb.value_and_grad(jax.jit(loss) if mode == "compiled loss" else loss, weight=tokens)
    found = (jax.jit(ours) if mode == "compiled window" else ours)(params, window)
    assert len(window) > 3
    rtol = rtol or tolerance(dtype, SUMMANDS)
    assert_all_close(jax.tree.leaves(found), padded(packed.token_loss), rtol)


def test_round_to_bounds_the_programs_of_a_compiled_loss():
    functions, params, _ = problem("float64")
    traces = []

    @jax.jit
    def loss(params, batch):
        traces.append(batch["ids"].shape)
        return packed.token_loss(functions, params, batch)

    ours = vb.value_and_grad(loss, weight=tokens)
    windows = set()
    for seed in range(20):
        window = pack(
            jax.tree.map(jnp.asarray, packed.batch(seed=seed)),
            packed.lengths(seed),
            microbatch_tokens=MICROBATCH_TOKENS,
            round_to=4,
        )
        windows.add(tuple(found["ids"].shape for found in window))
        ours(params, window)
    # Many windows, four shapes: each is traced, and so compiled, once.
    rows = MICROBATCH_TOKENS // LENGTH
    assert ROWS % rows == 0
    assert len(windows) > 10
    assert sorted(traces) == [(rows, length) for length in (4, 8, 12, 16)]


@pytest.mark.parametrize("compiled", [False, True])
def test_noise_statistics_are_refused(compiled):
    functions, params, batch = problem("float64")
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS)
    ours = vb.value_and_grad(partial(packed.row_loss, functions), stats=True)
    with pytest.raises(ValueError, match="Noise statistics need micro-batches of random rows"):
        (jax.jit(ours) if compiled else ours)(params, window)


@pytest.mark.parametrize("loss", [packed.padding_loss, packed.coupled_loss])
def test_losses_that_are_not_safe_to_pack_differ(loss):
    functions, params, batch = problem("float64")
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS)
    found = vb.value_and_grad(partial(loss, functions))(params, window)
    with pytest.raises(AssertionError, match="off by"):
        assert_all_close(jax.tree.leaves(found), padded(loss), 1e-3)


def test_arrays_stay_arrays_and_lengths_may_be_one():
    _, _, batch = problem("float64")
    for found in pack(batch, (batch["ids"] != 0).sum(1), microbatch_tokens=MICROBATCH_TOKENS):
        assert all(isinstance(leaf, jax.Array) for leaf in found.values())
        rows = np.asarray(found["row"]).astype(int)
        length = found["targets"].shape[1]
        np.testing.assert_array_equal(found["targets"], batch["targets"][rows][:, :length])


def test_lengths_inside_a_trace_are_refused():
    @jax.jit
    def run(ids):
        return pack(ids, (ids != 0).sum(1), microbatch_tokens=9)

    with pytest.raises(ValueError, match=r"by the values of their lengths\. Got lengths inside a"):
        run(jnp.ones((3, 4), int))


def test_a_batch_inside_a_trace_is_packed_by_lengths_of_the_host():
    functions, params, batch = problem("float64")

    @jax.jit
    def run(params, batch):
        window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS)
        loss = partial(packed.token_loss, functions)
        return vb.value_and_grad(loss, weight=tokens)(params, window)

    assert_all_close(jax.tree.leaves(run(params, batch)), padded(packed.token_loss))
