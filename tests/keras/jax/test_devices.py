"""Models whose rows `keras.distribution` spreads over devices, in programs of their own."""

import jax.numpy as jnp
import numpy as np
import pytest
from tests.processes import checked_on_four_devices, free_ports, together
from tests.tiers import tiered

from virtualbatch.keras._jax.devices import cut_by_device
from virtualbatch.keras._jax.gathered_rows import GatheredRows

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


def test_each_micro_batch_has_the_same_rows_of_every_device():
    # 5 rows on each of four devices, by 2; one device after another, as the batch has them.
    cut = cut_by_device(jnp.arange(20), 20, 2, 4)
    assert [np.asarray(rows).tolist() for rows in cut.microbatches()] == [
        [0, 1, 5, 6, 10, 11, 15, 16],
        [2, 3, 7, 8, 12, 13, 17, 18],
        [4, 9, 14, 19],
    ]
    assert cut.rows == [8, 8, 4]


def test_gathered_rows_come_in_the_order_of_the_batch():
    x = np.arange(40).reshape(20, 2)
    cut = cut_by_device(jnp.asarray(x), 20, 2, 4)
    kept = [
        [jnp.stack([segment.get(k) for k in range(segment.count)]), None]
        for segment in cut.segments
    ]
    rows, nothing = GatheredRows(cut, None, lambda batch, rows: []).joined(kept)
    np.testing.assert_array_equal(rows, x)
    assert nothing is None


@pytest.mark.parametrize(
    "checks",
    tiered(CHECKS, CHECKS[:1], "further programs, each process loads Keras"),
    ids=lambda checks: checks[0],
)
def test_on_four_devices(checks):
    checked_on_four_devices("tests.keras.jax.four_devices", checks, KERAS_BACKEND="jax")


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
