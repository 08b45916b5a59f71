"""The JAX engine on a CUDA device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
if jax.default_backend() != "gpu":
    pytest.skip("JAX sees no GPU", allow_module_level=True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import virtualbatch.jax as vb  # noqa: E402

MIB = 2**20


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def problem(rows=50, width=64, dtype="float64"):
    rng = np.random.default_rng(0)
    params = {
        "hidden": jnp.asarray(rng.normal(size=(8, width)) / 3, dtype),
        "out": jnp.asarray(rng.normal(size=(width, 2)) / 8, dtype),
    }
    x = jnp.asarray(rng.normal(size=(rows, 8)), dtype)
    return params, (x, jnp.asarray(rng.random(rows) < 0.7, dtype))


def loss_fn(params, batch):
    x, mask = batch
    out = jnp.tanh(x @ params["hidden"]) @ params["out"]
    return jnp.sum(jnp.sum(out**2, 1) * mask) / jnp.sum(mask)


def mask_of(batch):
    return jnp.sum(batch[1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [1, 7, 16, 50])
def test_the_gradient_is_that_of_the_uncut_batch(size, compiled):
    params, batch = problem()
    run = vb.value_and_grad(loss_fn, microbatch_size=size, weight=mask_of)
    run = jax.jit(run) if compiled else run
    found, due = run(params, batch), jax.value_and_grad(loss_fn)(params, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_bfloat16_accumulates_in_float32():
    params = jnp.ones((1, 1), "bfloat16")
    run = vb.value_and_grad(lambda p, x: jnp.mean(x @ p), microbatch_size=1)
    _, found = jax.jit(run)(params, jnp.ones((1024, 1), "bfloat16"))
    assert found.item() == 1


def test_temporaries_do_not_grow_with_the_micro_batches():
    sizes = []
    for steps in (2, 16, 64):
        params, batch = problem(32 * steps, 4096, "float32")
        run = jax.jit(vb.value_and_grad(loss_fn, microbatch_size=32, weight=mask_of))
        sizes.append(run.lower(params, batch).compile().memory_analysis().temp_size_in_bytes)
    assert max(sizes) <= 1.05 * min(sizes), sizes


def peak_of_a_window():
    """Prints the planned peak of a window of 4,096 rows, and what the device held."""
    params, batch = problem(4096, 16384, "float32")
    plan = vb.plan(loss_fn, weight=mask_of)(params, batch)
    run = jax.jit(vb.value_and_grad(loss_fn, microbatch_size=4096, weight=mask_of))
    jax.block_until_ready(run(params, batch))
    planned = next(row.peak_bytes for row in plan.rows if row.microbatch_size == 4096)
    print(planned, jax.local_devices()[0].memory_stats()["peak_bytes_in_use"])


def test_a_planned_peak_is_what_the_device_holds():
    # The device's counter cannot be set back, and XLA tries kernels while it compiles, on operands
    # of their own: in a process of its own, and without trying.
    child = subprocess.run(
        [sys.executable, "-c", "import test_jax; test_jax.peak_of_a_window()"],
        cwd=Path(__file__).parent,
        env=os.environ | {"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    planned, peak = (int(word) for word in child.stdout.split())
    # The device rounds up.
    assert 0.95 < planned / peak < 1.05, (planned / MIB, peak / MIB)


def test_a_window_that_runs_out_of_memory_is_run_in_smaller_micro_batches(caplog):
    limit = jax.local_devices()[0].memory_stats()["bytes_limit"]
    width = 16384
    # One activation fits, two do not.
    params, batch = problem(int(0.7 * limit / (4 * width)), width, "float32")
    rows = len(batch[0])
    found = vb.value_and_grad(loss_fn, microbatch_size=rows, weight=mask_of)(params, batch)
    assert "Out of memory" in caplog.text
    due = jax.jit(vb.value_and_grad(loss_fn, microbatch_size=256, weight=mask_of))(params, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True):
        # Products of a GPU round to tensor-float32, ten bits, unless asked not to.
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3 * float(jnp.abs(b).max()))
