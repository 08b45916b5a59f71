"""Automatic sizes: planned once for a signature, also while a program is traced."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import virtualbatch.jax as vb
from virtualbatch import Auto
from virtualbatch.jax import _remembered
from virtualbatch.plan.search import Search

pytestmark = pytest.mark.usefixtures("untimed_plans", "optimized")

ROWS, WIDTH = 64, 32


@pytest.fixture
def plans(monkeypatch):
    """The searches that are made."""
    made = []
    plan = Search.plan

    def counted(self):
        made.append(plan(self))
        return made[-1]

    monkeypatch.setattr(Search, "plan", counted)
    return made


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params) - batch["y"]) ** 2)


def problem(rows=ROWS):
    random = np.random.default_rng(0)
    batch = {name: jnp.asarray(random.normal(size=(rows, WIDTH))) for name in "xy"}
    return jnp.asarray(random.normal(size=(WIDTH, WIDTH))), batch


@pytest.mark.parametrize("mode", [lambda fun: fun, jax.jit], ids=["eager", "jit"])
def test_a_planned_call_is_that_of_the_same_size(mode, plans, caplog, quick_plans):
    params, batch = problem()
    with caplog.at_level(logging.INFO, "virtualbatch"):
        found = mode(vb.value_and_grad(loss, microbatch_size="auto"))(params, batch)
    (plan,) = plans
    assert f"microbatch_size={plan.microbatch_size} for batches of up to 64 rows" in caplog.text
    due = mode(vb.value_and_grad(loss, microbatch_size=plan.microbatch_size))(params, batch)
    assert found[0] == due[0]
    assert (found[1] == due[1]).all()


@pytest.mark.parametrize("mode", [lambda fun: fun, jax.jit], ids=["eager", "jit"])
def test_a_signature_is_planned_once(mode, plans):
    update = mode(vb.value_and_grad(loss, microbatch_size=Auto(memory_limit="1GiB")))
    for rows in (64, 64, 7, 64, 80, 64):
        update(*problem(rows))
    assert [plan.memory_limit for plan in plans] == [2**30, 2**30]


def test_sizes_are_timed_while_a_program_is_traced(plans, quick_plans):
    jax.jit(vb.value_and_grad(loss, microbatch_size="auto"))(*problem())
    assert any(row.seconds_per_batch is not None for row in plans[0].rows)


@pytest.mark.thorough("test_plan.py holds a limit")
def test_a_limit_holds_under_jit(plans):
    params, batch = problem(4096)
    whole = jax.jit(vb.value_and_grad(loss, microbatch_size=4096)).lower(params, batch)
    temporary = whole.compile().memory_analysis().temp_size_in_bytes
    given = params.nbytes * 2 + sum(x.nbytes for x in batch.values())
    size = Auto(memory_limit=int(given + 0.3 * temporary))
    jax.jit(vb.value_and_grad(loss, microbatch_size=size))(params, batch)
    assert plans[0].microbatch_size < 4096


def test_keys_are_no_obstacle(plans):
    def noisy(params, batch, key):
        kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        return loss(params, batch | {"x": batch["x"] * kept})

    run = vb.value_and_grad(noisy, microbatch_size="auto", key_argnum=2)
    jax.jit(run)(*problem(), jax.random.key(0))
    jax.jit(run)(*problem(80), jax.random.PRNGKey(0))
    assert len(plans) == 2


@pytest.mark.thorough("the files are those of the core, tests/core/test_auto.py")
def test_plans_of_a_file_are_used(plans, tmp_path):
    for _ in range(2):
        size = Auto(file=tmp_path / "plans.json")
        vb.value_and_grad(loss, microbatch_size=size)(*problem())
    assert len(plans) == 1


def test_a_plan_of_a_file_is_not_used_under_another_limit(plans, tmp_path):
    for limit in ("2GiB", "1GiB"):
        size = Auto(file=tmp_path / "plans.json", memory_limit=limit)
        vb.value_and_grad(loss, microbatch_size=size)(*problem())
    assert [plan.memory_limit for plan in plans] == [2**31, 2**30]


@pytest.mark.parametrize("size", ["auto", Auto(memory_limit="1GiB")], ids=["auto", "Auto"])
def test_a_loss_that_is_made_anew_is_planned_once_and_another_one_anew(size, plans):
    def other(params, batch):
        return jnp.mean(jnp.abs(batch["x"] @ params - batch["y"]))

    for inner in (loss, other):
        for _ in range(2):
            vb.value_and_grad(lambda p, b, f=inner: f(p, b), microbatch_size=size)(*problem())
    assert len(plans) == 2


def test_a_size_that_shrank_is_kept_for_a_loss_that_is_made_anew():
    tries = []

    def update(params, batch):
        def watched(params, batch):
            tries.append(len(batch["x"]))
            if len(batch["x"]) > 16:
                raise MemoryError
            return loss(params, batch)

        return vb.value_and_grad(watched, microbatch_size=ROWS)(params, batch)

    for _ in range(2):
        update(*problem())
    assert tries == [64, 32, *[16] * 4, *[16] * 4]
    # Of these parameters only: another model may have room for more.
    tries.clear()
    params, batch = problem()
    update(params[:, :8], {"x": batch["x"], "y": batch["y"][:, :8]})
    assert tries[0] == 64
    assert sum(bool(found.sizes) for found in _remembered._REMEMBERED.values()) == 1


def test_several_devices_are_refused():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = vb.value_and_grad(loss, microbatch_size="auto", axis_name="data")
    run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    with pytest.raises(ValueError, match=r"Got a call with axis_name\. Call plan with the shapes"):
        jax.jit(run)(*problem())
    run = vb.value_and_grad(loss, microbatch_size="auto")
    run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    with pytest.raises(ValueError, match=r"Got a call inside shard_map\. Call plan"):
        jax.jit(run)(*problem())


def test_a_window_is_refused():
    params, batch = problem()
    with pytest.raises(ValueError, match="A Window is already cut"):
        vb.value_and_grad(loss, microbatch_size="auto")(params, vb.Window([batch]))
