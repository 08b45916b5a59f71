"""Batches on four devices: `shard_map`, named axes, sharded arrays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiers import tiered

ROOT = Path(__file__).parents[2]
# In few processes: each of them loads JAX.
CHECKS = [
    [
        "one_reduction_of_all_rows",
        "a_device_without_tokens",
        "state_of_all_devices",
        "sharded_batches",
        "embeddings_of_all_devices",
    ],
    [
        "aux_of_all_rows",
        "without_axis_name_like_jax",
        "a_model_per_device_on_one_batch",
        "named_vmap_and_pmap",
        "two_axes",
    ],
    ["rows_of_every_device"],
]
WHY = "further programs, each process loads JAX"


@pytest.mark.parametrize("checks", tiered(CHECKS, CHECKS[:1], WHY), ids=lambda checks: checks[0])
def test_on_four_devices(checks):
    run_on_four_devices("four_devices", checks)


def run_on_four_devices(program, checks):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        # Before what was given: the package under test may be another one than the installed.
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    child = subprocess.run(
        [sys.executable, "-m", f"tests.jax.{program}", *checks],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if child.returncode != 0:
        raise AssertionError(f"{child.stdout[-1000:]}\n{child.stderr[-4000:]}")
    assert child.stdout.split() == [word for name in checks for word in ("ok", name)]
