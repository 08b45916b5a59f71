"""Windows whose rows cannot be told: with a weight their micro-batches are taken as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import MODES, assert_same, in_mode

import virtualbatch.jax as vb

# Data are arrays of NumPy: modules are imported before a test asks JAX for float64.
X = [np.random.default_rng(n).normal(size=(n, 2)) for n in (5, 3, 3)]
P = np.random.default_rng(9).normal(size=2)
WHOLE = np.concatenate(X)


class Graph:
    """Of the user's own, and no pytree."""

    def __init__(self, x):
        self.x = x


def edges(x):
    return {"x": x, "edge": jnp.zeros((2, len(x) + 2))}


def samples(x):
    return [{"box": row, "label": jnp.ones(())} for row in x]


def other(x):
    return (x, None) if len(x) == 3 else {"x": x, "e": jnp.ones(1)}


def rows(batch):
    if isinstance(batch, Graph):
        return batch.x
    if isinstance(batch, list):
        return jnp.stack([sample["box"] for sample in batch])
    return batch["x"] if isinstance(batch, dict) else batch[0]


def weight(batch):
    return len(rows(batch))


def mean(params, x):
    return jnp.tanh(x @ params).mean()


def fun(params, batch):
    return mean(params, rows(batch))


WAYS = [(make, mode) for make in (edges, samples, other) for mode in MODES]


@pytest.mark.parametrize(("make", "mode"), [*WAYS, (Graph, MODES[0])])
def test_with_a_weight_it_is_the_whole_batch(make, mode):
    found = in_mode(mode, vb.value_and_grad(fun, weight=weight))(P, vb.Window(map(make, X)))
    assert_same(found, jax.value_and_grad(mean)(P, WHOLE))


@pytest.mark.parametrize("make", [edges, samples, other, Graph])
def test_without_a_weight_it_is_refused_and_the_weight_named(make):
    with pytest.raises(
        (TypeError, ValueError), match=r"Or pass weight=.* See docs/guides/rows\.md\."
    ):
        vb.value_and_grad(fun)(P, vb.Window(map(make, X)))


@pytest.mark.parametrize("mode", MODES)
def test_aux_terms_and_statistics(mode):
    def terms(params, batch):
        found = rows(batch) @ params
        aux = {"nodes": found, "mean": found.mean(), "count": jnp.int32(len(found))}
        return fun(params, batch), aux

    options = {"has_aux": True, "stats": True, "weight": weight}
    window = vb.Window(map(edges, X))
    (_, aux), _, stats = in_mode(mode, vb.value_and_grad(terms, **options))(P, window)
    assert_same(aux, {"nodes": WHOLE @ P, "mean": (WHOLE @ P).mean(), "count": np.int32(11)})
    by_rows = vb.value_and_grad(lambda p, x: mean(p, x), stats=True)(P, vb.Window(X))[2]
    assert float(stats.rows) == float(by_rows.rows) == 11
    assert_same(stats.mean_square, by_rows.mean_square)


@pytest.mark.parametrize("mode", MODES)
def test_a_term_that_does_not_depend_on_the_rows_counts_once(mode):
    def terms(params, x):
        return {"mean": mean(params, x), "penalty": (params**2).sum()}

    options = {"weight": lambda batch: {"mean": weight(batch), "penalty": None}}
    window = vb.Window(map(edges, X))
    ours = vb.value_and_grad(lambda p, b: terms(p, rows(b)), **options)
    expected = jax.value_and_grad(lambda p: sum(terms(p, WHOLE).values()))(P)
    assert_same(in_mode(mode, ours)(P, window), expected)
    ours = vb.value_and_grad(lambda p, b: terms(p, rows(b)), stats=True, **options)
    with pytest.raises(ValueError, match=r"whose loss has several terms\. Leave stats out\."):
        in_mode(mode, ours)(P, window)


def test_what_cannot_be_cut_says_so_when_memory_runs_out():
    def too_large(params, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        vb.value_and_grad(too_large, weight=weight)(P, vb.Window(map(edges, X)))
    assert "cannot be cut smaller. Make smaller ones." in " ".join(caught.value.__notes__)
