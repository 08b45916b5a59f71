"""Weights: whatever a mean was divided by, in micro-batches that may have none of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import (
    MODES,
    assert_same,
    batch,
    in_mode,
    loss,
    params,
    pieces,
    term_weights,
    terms,
    token_loss,
    tokens,
    uncut,
)
from tests.tiers import tiered

import virtualbatch.jax as vb

P, B = params(), batch()
NOTHING = np.zeros_like(B["mask"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", tiered([1, 4, 10], [4], "further cuts"))
@pytest.mark.parametrize(
    ("fun", "weight"), [(token_loss, tokens), (terms, term_weights)], ids=["tokens", "terms"]
)
def test_an_empty_micro_batch_with_nan_loss_and_nan_gradients_does_not_count(
    fun, weight, size, mode
):
    assert np.isnan(token_loss(P, pieces(B, 0, 1)[0]))
    assert np.isnan(jax.grad(token_loss)(P, pieces(B, 0, 1)[0])["w"]).all()
    ours = in_mode(mode, vb.value_and_grad(fun, microbatch_size=size, weight=weight))
    assert_same(ours(P, B), uncut(fun, P, B))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", tiered([1, 4, 10], [4], "further cuts"))
def test_a_term_without_weight_in_the_whole_window_counts_0(size, mode):
    ours = in_mode(mode, vb.value_and_grad(terms, microbatch_size=size, weight=term_weights))
    empty = B | {"mask": NOTHING}

    def rest(params, batch):
        found = terms(params, batch)
        return found["weighted"] + found["penalty"]

    assert_same(ours(P, empty), jax.value_and_grad(rest)(P, empty))
    both = empty | {"sample_weight": np.zeros(10)}
    penalty = jax.value_and_grad(lambda params, batch: terms(params, batch)["penalty"])
    assert_same(ours(P, both), penalty(P, both))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("size", tiered([1, 4, 10], [4], "further cuts"))
def test_a_window_without_any_weight_gives_zeros(size, has_aux, mode):
    def fun(params, batch):
        found = token_loss(params, batch)
        return (found, batch["y"]) if has_aux else found

    empty = B | {"mask": NOTHING}
    ours = vb.value_and_grad(fun, has_aux=has_aux, microbatch_size=size, weight=tokens)
    value, gradients = in_mode(mode, ours)(P, empty)
    if has_aux:
        value, rows = value
        assert_same(rows, B["y"])
    assert_same((value, gradients), jax.tree.map(np.zeros_like, (np.zeros(()), P)))


WEIGHTS = {
    "int": lambda batch: len(batch["x"]),
    "NumPy": lambda batch: np.float32(len(batch["x"])),
    "NumPy array": lambda batch: np.array(len(batch["x"])),
    "int32": lambda batch: jnp.int32(len(batch["x"])),
    "bfloat16": lambda batch: jnp.bfloat16(len(batch["x"])),
    "traced": lambda batch: jnp.ones_like(batch["y"]).sum(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", tiered(WEIGHTS, ["bfloat16", "traced"], "further numbers"))
def test_every_kind_of_number(name, mode):
    ours = in_mode(mode, vb.value_and_grad(loss, microbatch_size=3, weight=WEIGHTS[name]))
    assert_same(ours(P, B), jax.value_and_grad(loss)(P, B))


def test_counts_above_what_the_dtype_of_the_loss_holds():
    # 2^24 + 1 is no float32 and 2049 no float16; shares are formed in float64 where there is one.
    counts = np.array([2.0**24 + 1, 1.0, 1.0, 1.0])
    rows = np.eye(4)

    def fun(weights, batch):
        return (batch["rows"] @ weights * batch["count"]).sum() / batch["count"].sum()

    found = {"rows": rows, "count": counts}
    ours = jax.jit(
        vb.value_and_grad(fun, microbatch_size=1, weight=lambda batch: batch["count"].sum())
    )
    assert_same(ours(np.zeros(4), found)[1], counts / counts.sum())


def test_finite_weights_with_a_total_that_is_none_are_not_taken_for_empty():
    # Each share would be 0, and loss and gradient 0 too.
    def fun(weights, batch):
        return (batch["rows"] @ weights * batch["count"]).sum() / batch["count"].sum()

    found = {"rows": np.eye(2, dtype=np.float32), "count": np.full(2, 2e38, np.float32)}
    with jax.enable_x64(False):
        ours = vb.value_and_grad(fun, microbatch_size=1, weight=lambda batch: batch["count"].sum())
        value, gradient = jax.jit(ours)(np.ones(2, np.float32), found)
    assert np.isnan([value, *gradient]).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_law_for_terms_in_a_dict_without_weights(mode):
    def fun(params, batch):
        return {"fit": loss(params, batch), "penalty": (params["w"] ** 2).sum()}

    for size in (3, 10):
        ours = in_mode(mode, vb.value_and_grad(fun, microbatch_size=size))
        assert_same(ours(P, B), uncut(fun, P, B))


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_micro_batch_passes_the_check_for_nan(mode):
    # The first micro-batch of one row has no token, so its loss is 0/0 until it is selected away.
    assert B["mask"][0].sum() == 0
    due = uncut(token_loss, P, B)
    with jax.debug_nans(True):
        run = in_mode(mode, vb.value_and_grad(token_loss, microbatch_size=1, weight=tokens))
        assert_same(run(P, B), due)
