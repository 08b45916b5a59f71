"""What differentiates in place of `jax.value_and_grad`."""

import functools

import jax
import jax.numpy as jnp
import pytest
from tests.jax.problems import MODES, assert_same, batch, in_mode, loss, params

import virtualbatch.jax as vb

P, B = params(), batch()


def clipped(function, has_aux, limit=0.5):
    """The mean of the rows' own gradients, each no longer than the limit, as in DP-SGD."""
    own = jax.value_and_grad(function, has_aux=has_aux)

    def of_row(params, row):
        value, gradients = own(params, jax.tree.map(lambda leaf: leaf[None], row))
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        return value, jax.tree.map(lambda g: g * jnp.minimum(1, limit / norm), gradients)

    def of_rows(params, batch):
        found = jax.vmap(of_row, (None, 0))(params, batch)
        return jax.tree.map(lambda leaf: leaf.mean(0), found)

    return of_rows


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_clipped_row_by_row(mode):
    due = clipped(lambda *args: (loss(*args), None), has_aux=True)(P, B)
    unclipped = clipped(loss, has_aux=False, limit=jnp.inf)(P, B)[1]
    assert float(jnp.abs(unclipped["w"] - due[1]["w"]).max()) > 0.01
    ours = in_mode(mode, vb.value_and_grad(loss, microbatch_size=4, grad_fn=clipped))
    assert_same(ours(P, B), (due[0][0], due[1]))
    # A limit of its own for each call is bound beforehand.
    tight = functools.partial(clipped, limit=0.01)
    found = in_mode(mode, vb.value_and_grad(loss, microbatch_size=4, grad_fn=tight))(P, B)[1]
    assert float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(found)))) <= 0.01
