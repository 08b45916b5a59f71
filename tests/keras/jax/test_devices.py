"""Models whose rows `keras.distribution` spreads over devices, in programs of their own."""

import os
import subprocess
import sys

import pytest
from tests.conftest import ROOT
from tests.processes import free_ports, together
from tests.tiers import tiered

# In few processes: each of them loads Keras.
CHECKS = [
    [
        "every_device_computes_its_own_rows",
        "weighted_and_masked",
        "statistics_of_all_rows",
    ],
    ["adam_with_clipping", "kernels_over_devices", "rows_that_devices_do_not_divide"],
    ["losses_of_all_rows", "the_first_window_proves_itself", "a_certificate", "noise"],
    ["what_runs_out_of_memory_runs_again", "a_planned_size", "rows_drop_features_of_their_own"],
    [
        "a_batch_of_one_micro_batch",
        "the_first_batch_says_how_it_is_cut",
        "several_steps_at_once",
        "eagerly",
        "packed",
        "batches_by_hand",
    ],
]


@pytest.mark.parametrize(
    "checks",
    tiered(CHECKS, CHECKS[:1], "further programs, each process loads Keras"),
    ids=lambda checks: checks[0],
)
def test_on_four_devices(checks):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": "jax",
        # Before what was given: the package under test may be another one than the installed.
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    child = subprocess.run(
        [sys.executable, "-m", "tests.keras.jax.four_devices", *checks],
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


@pytest.mark.thorough("starts two processes")
@pytest.mark.parametrize("check", ["exact", "refused"])
def test_two_processes(check):
    (port,) = free_ports(1)
    ended = together(
        "tests.keras.jax.two_processes",
        lambda number: [check, str(number), str(port)],
        lambda number: {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_PLATFORMS": "cpu",
            "KERAS_BACKEND": "jax",
        },
    )
    for process in ended:
        if process.status != 0:
            raise AssertionError(f"{process.status} after {process.seconds}: {process.output}")
        assert f"ok {check}" in process.output
