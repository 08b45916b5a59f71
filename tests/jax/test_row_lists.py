"""Lists of a batch are cut with its rows where that can be, and else refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import assert_same

import virtualbatch.jax as vb

# Data are arrays of NumPy: modules are imported before a test asks JAX for float64.
X = np.random.default_rng(0).normal(size=(4, 5, 2))
P = np.random.default_rng(1).normal(size=2)
LENGTHS = [5, 4, 2, 1]


def means(params, batch):
    pairs = zip(batch["x"], batch["lengths"], strict=True)
    return jnp.stack([(row[: int(n)] @ params).mean() for row, n in pairs])


def fun(params, batch):
    assert batch["names"] == ["a", "b"]
    return (means(params, batch) ** 2).mean()


@pytest.mark.parametrize("lengths", [LENGTHS, tuple(LENGTHS), list(map(str, LENGTHS))], ids=str)
def test_a_list_as_long_as_the_batch_follows_the_rows(lengths):
    batch = {"x": X, "lengths": lengths, "names": ["a", "b"]}
    found = vb.value_and_grad(fun, microbatch_size=3)(P, batch)
    assert_same(found, jax.value_and_grad(lambda p: fun(p, batch))(P))


def test_in_a_window_it_follows_the_rows_of_its_micro_batch():
    # Too large for memory, a micro-batch of a Window is cut, with its lists.
    calls = []

    def once_too_large(params, batch):
        calls.append(len(batch["lengths"]))
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return fun(params, batch)

    batch = {"x": X, "lengths": LENGTHS, "names": ["a", "b"]}
    found = vb.value_and_grad(once_too_large)(P, vb.Window([batch]))
    assert calls == [4, 2, 2]
    assert_same(found, jax.value_and_grad(lambda p: fun(p, batch))(P))


def test_aux_of_a_list_is_told_from_classes():
    def with_aux(params, batch):
        found = means(params, batch)
        return found.mean(), found

    batch = {"x": X, "lengths": LENGTHS}
    (_, found), _ = vb.value_and_grad(with_aux, microbatch_size=2, has_aux=True)(P, batch)
    assert_same(found, means(P, batch))


def test_certify_chooses_rows_of_lists():
    batch = {"x": X, "lengths": LENGTHS}
    assert vb.certify(lambda p, b: (means(p, b) ** 2).mean(), microbatch_size=2)(P, batch).exact


def test_a_list_that_a_program_would_cut_is_refused():
    ours = vb.value_and_grad(fun, microbatch_size=2)
    rest = {"x": X, "names": ["a", "b"]}
    with pytest.raises(
        TypeError, match=r"a compiled program cannot cut lists\. Got one beside 4 rows"
    ):
        jax.jit(lambda params: ours(params, rest | {"lengths": LENGTHS}))(P)
    # As an argument of a program its numbers are arrays without rows.
    ours = vb.value_and_grad(lambda p, b: (means(p, b) ** 2).mean(), microbatch_size=2)
    with pytest.raises(ValueError, match=r"Got the scalar batch\['lengths'\]\[0\]"):
        jax.jit(ours)(P, {"x": X, "lengths": LENGTHS})
