"""Windows: batches that come already cut, in equal or mixed shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import (
    MODES,
    assert_same,
    batch,
    in_mode,
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
CUTS = {
    "equal": (0, 2, 4, 6, 8, 10),
    "one": (0, 10),
    "remainder": (0, 4, 8, 10),
    "alternating": (0, 3, 5, 8, 10),
    "runs": (0, 1, 2, 6, 10),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", tiered(CUTS, ["remainder", "alternating"], "further cuts"))
def test_a_window_is_the_whole_batch(name, mode):
    def fun(params, batch):
        return terms(params, batch), (batch["y"] * 2, batch["y"].mean(), len(batch["y"]))

    window = vb.Window(pieces(B, *CUTS[name]))
    ours = in_mode(mode, vb.value_and_grad(fun, has_aux=True, weight=term_weights))
    (value, (rows, mean, count)), gradients = ours(P, window)
    assert_same((value, gradients), uncut(terms, P, B))
    assert_same((rows, mean), (B["y"] * 2, B["y"].mean()))
    assert int(count) == 10


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_of_one_size_and_other_lengths(mode):
    # The tokens that padding adds have no weight, so trimming changes nothing.
    length = np.array([4, 4, 2, 2, 3, 3, 1, 1, 4, 4])
    found = B | {"mask": np.arange(4) < length[:, None]}
    trimmed = [
        microbatch | {"mask": microbatch["mask"][:, : int(microbatch["mask"].sum(1).max())]}
        for microbatch in pieces(found, 0, 2, 4, 6, 8, 10)
    ]
    ours = in_mode(mode, vb.value_and_grad(token_loss, weight=tokens))
    assert_same(ours(P, vb.Window(trimmed)), uncut(token_loss, P, found))


def test_equal_shapes_are_one_loop_and_a_stream_of_windows_is_traced_once():
    traced = []

    def fun(params, batch):
        traced.append(batch["y"].shape[0])
        return token_loss(params, batch)

    update = jax.jit(vb.value_and_grad(fun, weight=tokens))
    stream = vb.windows(pieces(batch(24), *range(0, 25, 2)), accumulation_steps=4)
    assert [float(update(P, window)[0]) > 0 for window in stream] == [True] * 3
    assert traced == [2]
    window = vb.Window(pieces(batch(24), *range(0, 25, 2)))
    assert str(jax.make_jaxpr(vb.value_and_grad(fun, weight=tokens))(P, window)).count("scan[") == 2


def test_a_window_is_a_pytree():
    window = vb.Window(pieces(B, 0, 4, 10))
    doubled = jax.tree.map(lambda x: 2 * x, window[:2])
    assert isinstance(doubled, vb.Window)
    assert_same(doubled[1]["y"], B["y"][4:] * 2)
    assert jax.tree.structure(window) == jax.tree.structure(jax.jit(lambda w: w)(window))
    stacked = jax.vmap(lambda w: jax.tree.map(jnp.sum, w))(vb.Window([{"y": B["y"]}]))
    assert stacked[0]["y"].shape == (10,)
