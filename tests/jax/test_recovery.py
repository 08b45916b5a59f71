"""Out of memory in an un-jitted window: the result is that of a call with the smaller size."""

import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tests.tiers import tiered

import virtualbatch.jax as vb
from virtualbatch import Auto
from virtualbatch.jax._plan.memory import ERRORS, largest_arrays, left_bytes

pytestmark = pytest.mark.usefixtures("quick_plans")

ROWS = 24
Error = jax.errors.JaxRuntimeError

OUT_OF_MEMORY = [
    Error("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes."),
    Error("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."),
    Error("RESOURCE_EXHAUSTED: Failed to allocate request for 2.00GiB on device ordinal 0"),
    Error("RESOURCE_EXHAUSTED: Attempting to allocate 4.00G. That was not possible."),
    ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 536870912 bytes."),
    MemoryError(),
    MemoryError("Unable to allocate 7.45 GiB for an array"),
]
AMBIGUOUS = [
    Error("INTERNAL: YNNPACK operation failed"),
    Error("FAILED_PRECONDITION: DNN library initialization failed. Look at the errors above for"),
    Error(
        "INTERNAL: CUDNN_STATUS_INTERNAL_ERROR in external/xla/xla/stream_executor/cuda/cuda_dnn"
    ),
    Error("INTERNAL: CUDNN_STATUS_NOT_INITIALIZED in external/xla/xla/stream_executor/cuda"),
    Error("INTERNAL: failed to create cublas handle: CUBLAS_STATUS_NOT_INITIALIZED"),
    Error("INTERNAL: failed to create cublas handle: CUBLAS_STATUS_ALLOC_FAILED"),
]
OTHERS = [
    Error("RESOURCE_EXHAUSTED: Quota exceeded for requests"),
    Error("RESOURCE_EXHAUSTED: received message larger than max (5 vs. 4)"),
    Error("INVALID_ARGUMENT: out of memory bounds"),
    Error("INTERNAL: CUDA error: an illegal memory access was encountered"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes."),
    ValueError("memory_limit must be a positive number of bytes"),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_errors_that_mean_out_of_memory(error):
    assert ERRORS.is_certain(error)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_errors_that_only_mention_memory(error):
    assert not ERRORS.is_possible(error)


@pytest.mark.parametrize("error", AMBIGUOUS, ids=str)
def test_errors_that_may_mean_out_of_memory(error):
    assert ERRORS.is_possible(error)
    assert not ERRORS.is_certain(error)


def test_an_ambiguous_error_is_tried_with_less():
    found = run(ROWS, Points([0], AMBIGUOUS[0]))
    assert_same(found, run(ROWS // 2, Points()))


def test_an_ambiguous_error_that_less_does_not_mend_comes_out_as_it_was():
    with pytest.raises(Error) as raised:
        run(8, Points(range(1000), AMBIGUOUS[0]))
    assert raised.value is AMBIGUOUS[0]


def test_something_is_left():
    assert left_bytes() > 2**20


def test_the_largest_arrays_come_first():
    found = largest_arrays({"a": jnp.ones(3), "b": [jnp.ones(5), 7]})
    assert [name for name, _ in found] == ["['b'][0]", "['a']"]


class Points:
    """Counts places where memory may run out, and lets it run out at some."""

    def __init__(self, fail=(), error=OUT_OF_MEMORY[0]):
        self.fail, self.error, self.count = set(fail), error, 0

    def __call__(self):
        self.count += 1
        if self.count - 1 in self.fail:
            raise self.error


def passing(point):
    @jax.custom_vjp
    def identity(x):
        point()
        return x

    def forward(x):
        point()
        return x, None

    def backward(_, gradient):
        point()
        return (gradient,)

    identity.defvjp(forward, backward)
    return identity


def problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": jax.random.normal(keys[0], (6, 16), dtype),
        "last": jax.random.normal(keys[1], (16,), dtype),
    }
    batch = {
        "x": jax.random.normal(keys[2], (ROWS, 6), dtype),
        "mask": jax.random.bernoulli(keys[3], 0.7, (ROWS,)).astype(dtype),
    }
    return params, batch


def window(point, **options):
    identity = passing(point)

    def loss(params, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["first"])
        hidden = identity(hidden * jax.random.bernoulli(key, 0.6, hidden.shape))
        errors = (hidden @ params["last"]) ** 2
        return (errors * batch["mask"]).sum() / batch["mask"].sum(), errors

    def weight(batch):
        point()
        return batch["mask"].sum()

    return vb.value_and_grad(loss, has_aux=True, weight=weight, key_argnum=2, **options)


def run(size, point, dtype=jnp.float32):
    return window(point, microbatch_size=size)(*problem(dtype), jax.random.key(7))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x == y).all()


@pytest.mark.parametrize("seed", tiered(range(25), range(4), "test_injection.py has its points"))
def test_a_window_that_ran_out_is_that_of_the_smaller_size(seed):
    chance = random.Random(seed)
    size = chance.choice([24, 12, 8, 7, 5])
    dtype = chance.choice([jnp.float32, jnp.bfloat16])
    undisturbed = Points()
    run(size, undisturbed, dtype)
    point = Points([chance.randrange(undisturbed.count)], chance.choice(OUT_OF_MEMORY))
    found = run(size, point, dtype)
    assert point.count > undisturbed.count
    largest = -(-ROWS // -(-ROWS // size))
    assert_same(found, run(largest // 2, Points(), dtype))


def test_other_errors_come_out_as_they_are():
    point = Points([1], OTHERS[0])
    with pytest.raises(Error, match="Quota exceeded"):
        run(8, point)
    assert point.count == 2


def test_it_may_run_out_again_and_again(caplog):
    with caplog.at_level(logging.WARNING, "virtualbatch"):
        found = run(ROWS, Points([1, 4, 9]))
    assert_same(found, run(3, Points()))
    assert len(caplog.messages) == 3


def test_the_smaller_size_is_kept_with_the_function():
    point = Points([1])
    update = window(point, microbatch_size=ROWS)
    arguments = (*problem(), jax.random.key(7))
    update(*arguments)
    before = point.count
    second = update(*arguments)
    third = Points()
    again = window(third, microbatch_size=ROWS // 2)
    # Its first call is traced once for its aux, too.
    assert_same(second, again(*arguments))
    after = third.count
    again(*arguments)
    assert point.count - before == third.count - after


def test_it_grows_again_when_asked(untimed_plans):
    # A size planned by time may be odd, and is not back after one doubling.
    # The planning runs the function under a trace, where points count too.
    point = Points()
    update = window(point, microbatch_size=Auto(grow_after=1, memory_limit="1GiB"))
    arguments = (*problem(), jax.random.key(7))
    first = update(*arguments)
    point.fail = {point.count + 1}
    update(*arguments)
    assert_same(update(*arguments), first)


def test_a_number_of_micro_batches_is_recovered_too():
    found = window(Points([3]), accumulation_steps=2)(*problem(), jax.random.key(7))
    assert_same(found, run(6, Points()))


def test_micro_batches_of_a_window_are_cut_further():
    params, batch = problem()

    def cut(*stops):
        return vb.Window(
            jax.tree.map(lambda x, a=a, b=b: x[a:b], batch)
            for a, b in zip((0, *stops), stops, strict=False)
        )

    found = window(Points([4]))(params, cut(10, 14, 24), jax.random.key(7))
    assert_same(found, window(Points())(params, cut(5, 10, 14, 19, 24), jax.random.key(7)))


def test_nothing_is_left_to_halve():
    point = Points(range(1000), OUT_OF_MEMORY[1])
    with pytest.raises(MemoryError, match=r"one row must fit.* 64\.0 GiB more were asked for") as e:
        run(ROWS, point)
    assert "[0]['first'] (384 B)" in str(e.value)
    for text in (" left. Nothing of this update", "checkpointing", "bfloat16", "rows shorter"):
        assert text in str(e.value)
    assert isinstance(e.value.__cause__, Error)
    assert point.count == 5


def test_windows_that_really_run_out_of_memory():
    script = Path(__file__).with_name("limited.py")
    child = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout)
    text = results.pop("one row")
    assert results.keys() == {"forward", "backward", "weight"}
    assert all(size in (32, 16, 8, 4) for size in results.values()), results
    assert "Got one row, and 4.0 GiB more were asked for with " in text
