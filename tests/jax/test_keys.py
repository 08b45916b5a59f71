"""Random keys: other numbers in every micro-batch, the keys as they are in an uncut batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import MODES, assert_same, in_mode, on_device
from tests.tiers import tiered

import virtualbatch.jax as vb

X = np.ones((8, 16))
KINDS = {
    "typed": jax.random.key,
    "raw": jax.random.PRNGKey,
    "rbg": lambda seed: jax.random.key(seed, impl="rbg"),
}


def dropout(params, batch, key):
    kept = jax.random.bernoulli(key, 0.5, batch.shape)
    return jnp.mean(batch * kept * params), kept


def window(fun, **options):
    return vb.value_and_grad(fun, has_aux=True, key_argnum=2, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", tiered(KINDS, ["raw"], "further keys"))
def test_masks_differ_between_micro_batches(kind, mode):
    key = KINDS[kind](0)
    for size in (2, 3):
        (value, kept), gradient = in_mode(mode, window(dropout, microbatch_size=size))(2.0, X, key)
        assert kept.shape == X.shape
        assert len(np.unique(np.asarray(kept), axis=0)) == 8
        assert_same(gradient, jnp.mean(kept, dtype=float))
        assert_same(value, 2 * gradient)
    # As many micro-batches from whichever cut draw the same numbers, jitted or not.
    number = jax.random.fold_in(key, 1)
    halves = in_mode(mode, window(dropout, microbatch_size=4))(2.0, X, key)[0][1]
    assert_same(halves[4:], jax.random.bernoulli(number, 0.5, (4, 16)))


@pytest.mark.parametrize("mode", MODES)
def test_without_key_argnum_all_micro_batches_draw_the_same(mode):
    run = vb.value_and_grad(dropout, has_aux=True, microbatch_size=2)
    kept = in_mode(mode, run)(2.0, X, jax.random.key(0))[0][1]
    assert len(np.unique(np.asarray(kept), axis=0)) == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", tiered(KINDS, ["typed"], "further keys"))
def test_one_micro_batch_uses_the_keys_as_they_are(kind, mode):
    key = KINDS[kind](3)
    ours = in_mode(mode, window(dropout, microbatch_size=8))(2.0, X, key)
    due = in_mode(mode, jax.value_and_grad(dropout, has_aux=True))(2.0, X, key)
    assert_same(ours, due)


@pytest.mark.parametrize("mode", MODES)
def test_a_tree_of_keys_of_any_shape(mode):
    keys = {"dropout": jax.random.key(0), "layers": jax.random.split(jax.random.key(1), (2, 3))}

    def fun(params, batch, keys):
        draws = jax.vmap(jax.vmap(jax.random.normal))(keys["layers"])
        per_row = jnp.broadcast_to(draws, (len(batch), 2, 3))
        return dropout(params, batch, keys["dropout"])[0], per_row

    (_, draws), _ = in_mode(mode, window(fun, microbatch_size=1))(2.0, X, keys)
    assert draws.shape == (8, 2, 3)
    assert len(np.unique(np.asarray(draws))) == 8 * 6


def test_a_batch_of_models_with_a_key_each():
    keys = jax.random.split(jax.random.key(0), 3)
    run = jax.vmap(window(dropout, microbatch_size=4), (None, None, 0))
    (_, kept), _ = jax.jit(run)(2.0, on_device(X), keys)
    assert len(np.unique(np.asarray(kept).reshape(24, 16), axis=0)) == 24


BAD = {
    "array": np.ones(2, "float32"),
    "two raw keys": np.ones((3, 2), "uint32"),
    "int": 3,
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_key(name):
    got = {"array": r"dtype float32, shape \(2,\)", "int": "int"}.get(name, r"shape \(3, 2\)")
    with pytest.raises(
        TypeError,
        match=rf"argument that holds PRNG keys only\. Got .*{got}\. Pass jax\.random\.key",
    ):
        window(dropout, microbatch_size=2)(2.0, X, BAD[name])
