"""Plans: what XLA says of memory is what is compiled, limits hold, and nothing runs for it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import virtualbatch.jax as vb

pytestmark = pytest.mark.usefixtures("untimed_plans", "optimized")

WIDTH, ROWS = 64, 256


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"])
    return jnp.mean((jnp.tanh(hidden @ params["second"]) - batch["y"]) ** 2)


def problem(rows=ROWS):
    random = np.random.default_rng(0)
    params = {
        name: jnp.asarray(random.normal(size=(WIDTH, WIDTH)), jnp.float32)
        for name in ("first", "second")
    }
    batch = {name: jnp.asarray(random.normal(size=(rows, WIDTH)), jnp.float32) for name in "xy"}
    return params, batch


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def peak(size, params, batch):
    """Bytes of the program that a user would run with this size."""
    window = jax.jit(vb.value_and_grad(loss, microbatch_size=size))
    found = window.lower(params, batch).compile().memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def test_peaks_are_those_of_the_programs():
    params, batch = problem()
    found = vb.plan(loss)(params, abstract(batch))
    for row in found.rows:
        assert row.measured
        assert row.peak_bytes == peak(row.microbatch_size, params, batch)


def test_an_unseen_size_is_predicted_within_three_percent():
    params, batch = problem(1024)
    found = vb.plan(loss)(params, abstract(batch))
    measured = {row.microbatch_size: row.peak_bytes for row in found.rows if row.measured}
    assert len(measured) <= 3
    small, large = sorted(measured)[:2]
    slope = (measured[large] - measured[small]) / (large - small)
    for size in (64, 128, 256, 512):
        predicted = measured[small] + slope * (size - small)
        assert predicted == pytest.approx(peak(size, params, batch), rel=0.03)


@pytest.mark.parametrize("room", [0.2, 0.5, 0.9])
def test_the_size_is_the_largest_that_fits_a_limit_and_divides_the_batch(room):
    rows = 4096
    params, batch = problem(rows)
    least, most = peak(1, params, batch), peak(rows, params, batch)
    limit = int(least + room * (most - least))
    found = vb.plan(loss, memory_limit=limit)(abstract(params), abstract(batch))
    size = found.microbatch_size
    assert found.memory_limit == limit
    assert found.accumulation_steps == -(-rows // size)
    assert peak(size, params, batch) <= limit
    assert rows % size == 0
    assert peak(2 * size, params, batch) > limit


def test_without_data_nothing_runs():
    runs = []

    def watched(params, batch):
        jax.debug.callback(lambda: runs.append(1))
        return loss(params, batch)

    params, batch = problem()
    found = vb.plan(watched)(abstract(params), abstract(batch))
    assert runs == []
    assert all(row.seconds_per_batch is None for row in found.rows)
    assert found.microbatch_size == ROWS


def test_with_data_sizes_are_timed_and_data_stays(quick_plans):
    params, batch = problem()
    before = jax.tree.map(np.array, (params, batch))
    found = vb.plan(loss)(params, batch)
    times = {r.microbatch_size: r.seconds_per_batch for r in found.rows if r.seconds_per_batch}
    assert len(times) >= 2
    assert times[found.microbatch_size] <= 1.05 * min(times.values())
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves((params, batch)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_planned_is_the_call_with_its_options(quick_plans):
    def with_options(batch, key, params, scale):
        noise = jax.random.normal(key, batch["y"].shape)
        return loss(params, batch) * scale + 0 * noise.sum(), {"kept": batch["x"] @ batch["x"].T}

    params, batch = problem(64)
    found = vb.plan(
        with_options,
        argnums=2,
        has_aux=True,
        batch_argnum=0,
        key_argnum=1,
        weight=lambda batch: batch["x"].shape[0],
        memory_limit="2MiB",
    )(batch, jax.random.key(0), params, 2.0)
    assert 1 <= found.microbatch_size <= 64


@pytest.mark.parametrize("limit", [1000, "1kB"])
def test_a_limit_that_nothing_fits_says_what_is_needed(limit):
    params, batch = problem()
    with pytest.raises(ValueError, match=r"memory_limit must hold .* and one row needs 1\d\d\.\d"):
        vb.plan(loss, memory_limit=limit)(params, batch)


def test_refusals():
    params, batch = problem(8)
    with pytest.raises(ValueError, match=r"memory_limit must be a positive number .*'3 apples'"):
        vb.plan(loss, memory_limit="3 apples")(params, batch)
    with pytest.raises(ValueError, match=r"Got a call inside jit or another trace\."):
        jax.jit(vb.plan(loss))(params, batch)
    with pytest.raises(ValueError, match=r"All arrays of a batch must have the same number"):
        vb.plan(loss)(params, {"x": batch["x"], "y": batch["y"][:5]})
    with pytest.raises(TypeError, match=r"fun must be a function"):
        vb.plan(3)
    with pytest.raises(ValueError, match=r"A Window is already cut"):
        vb.plan(loss)(params, vb.Window([batch]))


@pytest.fixture
def nothing_compiles(monkeypatch):
    """As where the compiler itself does not get the memory that it needs."""

    def compile(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)


@pytest.mark.usefixtures("nothing_compiles")
def test_sizes_are_tried_where_nothing_compiles(caplog, quick_plans):
    seen = []

    def counted(params, batch):
        rows = len(batch["x"])
        seen.append(rows)
        if rows > 8:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."
            )
        return loss(params, batch)

    with caplog.at_level(logging.INFO, "virtualbatch"):
        found = vb.plan(counted)(*problem(32))
    assert [row.microbatch_size for row in found.rows] == [1, 2, 4, 8]
    assert found.microbatch_size <= 8
    (line,) = caplog.messages
    assert "sizes are tried from the smallest" in line


@pytest.mark.thorough("another process under a limit")
@pytest.mark.parametrize("room", [12, 100])
def test_a_plan_lives_within_a_limit_of_the_process(room):
    script = Path(__file__).with_name("tight.py")
    # Else the C library keeps what is freed, and what fits is a matter of luck.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, script, str(room)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)["plan"]
    assert found["memory_limit"] < (room + 1) * 2**20
    chosen = next(r for r in found["rows"] if r["microbatch_size"] == found["microbatch_size"])
    assert chosen["seconds_per_batch"] is not None
    assert chosen["peak_bytes"] <= found["memory_limit"]
    # The whole batch would take 130 MiB.
    assert found["accumulation_steps"] > 1


@pytest.mark.usefixtures("nothing_compiles")
def test_without_data_nothing_can_be_tried():
    params, batch = problem()
    with pytest.raises(ValueError, match="one row ran out of memory"):
        vb.plan(loss)(params, abstract(batch))
