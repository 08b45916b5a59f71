"""Convolutions of a window's program: the same numbers, in the order of XLA's fast kernel."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun
from tests.oracle import assert_all_close
from tests.tiers import tiered

import virtualbatch.jax as vb
from virtualbatch.jax import _convolution
from virtualbatch.jax._convolution import with_fast_convolutions

pytestmark = pytest.mark.usefixtures("optimized")

_random = np.random.default_rng(0)


def _array(*shape):
    return jnp.asarray(_random.normal(size=shape))


NHWC = ("NHWC", "HWIO", "NHWC")

# name: (input shape, kernel shape, arguments of the convolution)
CONVOLUTIONS = {
    "plain": ((4, 9, 8, 3), (3, 2, 3, 6), {"dimension_numbers": NHWC}),
    "channels first": ((4, 3, 9, 8), (6, 3, 3, 2), {}),
    "strided": ((4, 9, 8, 3), (3, 2, 3, 6), {"window_strides": (2, 3), "dimension_numbers": NHWC}),
    "padded unevenly": (
        (4, 9, 8, 3),
        (3, 2, 3, 6),
        {"padding": ((0, 2), (1, 0)), "dimension_numbers": NHWC},
    ),
    "dilated": ((4, 9, 8, 3), (3, 2, 3, 6), {"rhs_dilation": (2, 3), "dimension_numbers": NHWC}),
    "transposed": (
        (4, 5, 4, 3),
        (3, 2, 3, 6),
        {"lhs_dilation": (2, 3), "padding": ((1, 1), (2, 0)), "dimension_numbers": NHWC},
    ),
    "grouped": (
        (4, 9, 8, 4),
        (3, 2, 2, 6),
        {"feature_group_count": 2, "dimension_numbers": NHWC},
    ),
    "grouped by batch": (
        (4, 9, 8, 4),
        (3, 2, 4, 6),
        {"batch_group_count": 2, "dimension_numbers": NHWC},
    ),
    "one axis": ((4, 9, 3), (3, 3, 6), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
    "three axes": (
        (2, 5, 4, 6, 2),
        (2, 3, 2, 2, 4),
        {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")},
    ),
}


def _loss(options):
    given = {"window_strides": None, "padding": "VALID"} | options

    def loss(kernel, x):
        strides = given["window_strides"] or (1,) * (x.ndim - 2)
        rest = {k: v for k, v in given.items() if k not in ("window_strides", "padding")}
        found = lax.conv_general_dilated(x, kernel, strides, given["padding"], **rest)
        return jnp.mean(jnp.sin(found))

    return loss


def _slow(program):
    return [x for x in _convolution._convolutions(program.jaxpr) if _convolution._is_slow(x)]


@pytest.mark.parametrize(
    "name",
    tiered(CONVOLUTIONS, ["padded unevenly", "transposed", "grouped by batch"], "further layouts"),
)
def test_same_gradients(name):
    x_shape, kernel_shape, options = CONVOLUTIONS[name]
    function = jax.value_and_grad(_loss(options), argnums=(0, 1))
    kernel, x = _array(*kernel_shape), _array(*x_shape)
    program = jax.make_jaxpr(function)(kernel, x)
    rewritten = with_fast_convolutions(program)
    assert _slow(program)
    assert not _slow(rewritten)
    assert_all_close(jaxpr_as_fun(rewritten)(kernel, x), jax.tree.leaves(function(kernel, x)))


WRAPPINGS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit in jit": lambda f: jax.jit(jax.jit(f)),
    "scan": lambda f: lambda k, x: lax.scan(lambda c, one: (c + f(k, one), None), 0.0, x[None])[0],
    "cond": lambda f: lambda k, x: lax.cond(x.sum() > 0, f, lambda k, x: 2 * f(k, x), k, x),
    "closed over": lambda f: lambda k, x: jax.jit(lambda x: f(k, x))(x),
}


@pytest.mark.parametrize(
    "wrapping", tiered(WRAPPINGS, ["scan", "cond"], "further programs around it")
)
def test_inside_other_programs(wrapping):
    x_shape, kernel_shape, options = CONVOLUTIONS["plain"]
    function = jax.value_and_grad(WRAPPINGS[wrapping](_loss(options)), argnums=(0, 1))
    kernel, x = _array(*kernel_shape), _array(*x_shape)
    program = jax.make_jaxpr(function)(kernel, x)
    rewritten = with_fast_convolutions(program)
    assert _slow(program)
    assert not _slow(rewritten)
    assert_all_close(jaxpr_as_fun(rewritten)(kernel, x), jax.tree.leaves(function(kernel, x)))


def test_programs_without_convolutions_stay_as_they_are():
    program = jax.make_jaxpr(lambda x: jnp.sin(x) @ x)(_array(3, 3))
    assert with_fast_convolutions(program) is program


def test_other_devices_keep_their_own_order(monkeypatch):
    x_shape, kernel_shape, options = CONVOLUTIONS["plain"]
    program = jax.make_jaxpr(jax.grad(_loss(options)))(_array(*kernel_shape), _array(*x_shape))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert with_fast_convolutions(program) is program


def test_a_window_equals_the_whole_batch():
    loss = _loss({"dimension_numbers": NHWC})
    kernel, x = _array(3, 2, 3, 6), _array(11, 9, 8, 3)
    found = jax.jit(vb.value_and_grad(loss, microbatch_size=3))(kernel, x)
    assert_all_close(found, jax.value_and_grad(loss)(kernel, x))


@pytest.mark.thorough("it measures time")
def test_a_scan_is_not_slower_than_calls():
    """XLA's generic kernel would take ten times as long; 3 leaves room for a busy machine."""
    loss = _loss({"dimension_numbers": NHWC})
    # The fast kernel knows no float64.
    kernel = _array(3, 3, 32, 32).astype(jnp.float32)
    x = _array(64, 16, 16, 32).astype(jnp.float32)
    window = jax.jit(vb.value_and_grad(loss, microbatch_size=16))
    micro = jax.jit(jax.value_and_grad(loss))
    pieces = [x[i : i + 16] for i in range(0, 64, 16)]

    def best(run):
        jax.block_until_ready(run())
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        return min(times)

    ratio = best(lambda: window(kernel, x)) / best(lambda: [micro(kernel, p) for p in pieces])
    assert ratio < 3
