"""The first window of a loss proves itself, un-jitted."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.test_certify import CORRECT, PARAMS, WRONG, X
from tests.tiers import tiered

import virtualbatch.jax as vb

pytestmark = pytest.mark.proves_itself

FAULTS = {
    name: entry
    for name, entry in WRONG.items()
    if entry[3] in {"weight", "sum_loss", "coupled_rows", "regulariser"}
}


@pytest.mark.parametrize("name", tiered(CORRECT, ["mask"], "further correct losses"))
def test_no_false_alarm(name, caplog):
    fun, options, arguments = CORRECT[name]
    vb.value_and_grad(fun, microbatch_size=4, **options)(PARAMS, *arguments)
    assert not caplog.records


@pytest.mark.parametrize("name", tiered(FAULTS, ["a sum"], "further wrong losses"))
def test_what_certify_names_is_refused(name):
    fun, options, batch, kind, where, text = FAULTS[name]
    ours = vb.value_and_grad(fun, microbatch_size=4, **options)
    with pytest.raises(ValueError, match=rf"must add up .*{kind} at .*{where}") as refused:
        ours(PARAMS, batch)
    assert text in str(refused.value)
    # Nothing is remembered of what was refused.
    with pytest.raises(ValueError, match="must add up"):
        ours(PARAMS, batch)


def squares(params, x):
    return ((x @ params["first"]) ** 2).sum()


def test_a_sum_that_says_so_is_right():
    given = jax.value_and_grad(squares)(PARAMS, X)
    found = vb.value_and_grad(squares, microbatch_size=4, weight="sum")(PARAMS, X)
    np.testing.assert_allclose(found[0], given[0], 1e-5)
    np.testing.assert_allclose(found[1]["first"], given[1]["first"], 1e-4)


def test_the_check_can_be_turned_off():
    vb.value_and_grad(squares, microbatch_size=4, check=False)(PARAMS, X)


def test_a_divisor_with_a_floor_is_refused_where_a_micro_batch_is_empty():
    def loss(w, batch):
        return jax.nn.softplus(batch["x"] @ w).sum() / jnp.maximum(batch["mask"].sum(), 1)

    batch = {"x": X[:4], "mask": jnp.array([1.0, 0.0, 1.0, 1.0])}
    ours = vb.value_and_grad(loss, microbatch_size=1, weight=lambda b: b["mask"].sum())
    with pytest.raises(ValueError, match=r'weight 0 is left out.*weight="sum".*/weights\.md'):
        ours(jnp.ones(8), batch)


def test_a_try_leaves_the_random_numbers_of_the_host():
    def loss(w, batch):
        random.random()
        return ((batch @ w) ** 2).sum()

    ours, state = vb.value_and_grad(loss, microbatch_size=4), random.getstate()
    # What draws them cannot be tried, so the window itself draws once for each micro-batch.
    ours(jnp.ones(8), X)
    expected = [random.random() for _ in range(2)]
    random.setstate(state)
    for _ in range(6):
        random.random()
    assert [random.random() for _ in range(2)] == expected


def test_it_is_tried_once_for_each_structure():
    calls = []

    def loss(w, batch):
        calls.append(1)
        return (batch["x"] @ w).mean()

    ours = vb.value_and_grad(loss, microbatch_size=4)
    counts = []
    for batch in ({"x": X}, {"x": X}, {"x": X, "y": X}, {"x": X}):
        calls.clear()
        ours(jnp.ones(8), batch)
        counts.append(len(calls))
    # 22 rows are six micro-batches; a part, the whole and the other part are three calls more.
    assert counts == [9, 6, 9, 6]


def test_an_error_on_odd_rows_is_told_once_and_the_window_runs(caplog):
    def loss(w, batch):
        return ((batch @ w).reshape(-1, 2) ** 2).mean()

    ours = vb.value_and_grad(loss, microbatch_size=4)
    for _ in range(2):
        ours(jnp.ones(8), X[:20])
    (record,) = caplog.records
    assert "could not be tried (TypeError" in record.getMessage()
