"""A mesh in use: rows spread over its devices by the engine; one device as without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tests.jax.problems import (
    MODES,
    assert_same,
    batch,
    in_mode,
    params,
    pieces,
    token_loss,
    tokens,
    uncut,
)
from tests.jax.test_devices import WHY
from tests.processes import checked_on_four_devices
from tests.tiers import tiered

import virtualbatch.jax as vb

ON_A_MESH = [
    [
        "rows_of_all_devices",
        "reductions_once_and_own_rows",
        "parameters_spread_over_the_axis",
        "keys_differ",
        "losses_that_start_from_zeros",
        "refusals",
        "said_once",
    ],
    [
        "outside_of_a_trace",
        "a_first_window_proves_itself",
        "aux_of_all_kinds",
    ],
    [
        "parameters_spread_in_all_ways",
        "a_shard_map_over_some_axes",
        "laws_by_hand",
        "embeddings_of_all_devices",
    ],
]


@pytest.mark.parametrize(
    "checks", tiered(ON_A_MESH, ON_A_MESH[:1], WHY), ids=lambda checks: checks[0]
)
def test_on_a_mesh_in_use(checks):
    checked_on_four_devices("tests.jax.four_devices_mesh", checks)


@pytest.fixture(params=tiered(["Auto", "Explicit"], ["Explicit"], "the same programs again"))
def _one_device(request):
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType[request.param],))):
        yield


@pytest.mark.usefixtures("_one_device")
@pytest.mark.parametrize("mode", tiered(MODES, ["jit"], "the proof compiles twenty programs"))
def test_gradients_of_one_device(mode):
    found = batch(10)
    run = vb.value_and_grad(token_loss, microbatch_size=4, weight=tokens, axis_name="data")
    assert_same(in_mode(mode, run)(params(), found), uncut(token_loss, params(), found))


@pytest.mark.usefixtures("_one_device")
def test_a_window_of_one_device():
    found = batch(10)
    run = vb.value_and_grad(token_loss, weight=tokens, axis_name="data")
    window = vb.Window(pieces(found, 0, 3, 10))
    assert_same(jax.jit(run)(params(), window), uncut(token_loss, params(), found))


def test_keys_of_one_device_are_those_without_a_mesh():
    def fun(w, x, key):
        return jnp.mean(w * x), jax.random.normal(key, x.shape)

    options = {"has_aux": True, "microbatch_size": 4, "key_argnum": 2}
    given = 1.0, np.ones(8), jax.random.key(0)
    due = jax.jit(vb.value_and_grad(fun, **options))(*given)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert_same(jax.jit(vb.value_and_grad(fun, axis_name="data", **options))(*given), due)
