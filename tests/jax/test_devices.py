"""Batches on four devices: `shard_map`, named axes, sharded arrays."""

import pytest
from tests.processes import checked_on_four_devices
from tests.tiers import tiered

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
    checked_on_four_devices("tests.jax.four_devices", checks)
