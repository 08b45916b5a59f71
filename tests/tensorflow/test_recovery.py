"""Out of memory in an eager window: the result is that of a call with the smaller size."""

import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tests.tiers import tiered

import virtualbatch.tensorflow as vb
from virtualbatch import Auto
from virtualbatch.tensorflow._plan.memory import ERRORS, largest_variables, left_bytes

pytestmark = pytest.mark.usefixtures("quick_plans")

ROWS = 24


def exhausted(text):
    return tf.errors.ResourceExhaustedError(None, None, text)


def internal(text):
    return tf.errors.InternalError(None, None, text)


OUT_OF_MEMORY = [
    exhausted("OOM when allocating tensor with shape[64,1048576] and type float on CPU:0"),
    exhausted("Out of memory while trying to allocate 68719476736 bytes."),
    exhausted("failed to allocate memory [Op:Mul]"),
    internal("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    internal("Failed to allocate 8 bytes for new constant"),
    MemoryError(),
    MemoryError("Unable to allocate 7.45 GiB for an array"),
]  # fmt: skip
AMBIGUOUS = [
    tf.errors.AbortedError(None, None, "Operation received an exception:Status: 1, message: could "
                           "not create a primitive, in file tensorflow/core/kernels/mkl"),
    tf.errors.AbortedError(None, None, "Status: 1, message: could not execute a primitive"),
    tf.errors.AbortedError(None, None, "Status: 1, message: could not create a memory object"),
    internal("YNNPACK operation failed"),
    internal("cuDNN launch failure: CUDNN_STATUS_INTERNAL_ERROR"),
    internal("CUDNN_STATUS_NOT_INITIALIZED in tensorflow/stream_executor/cuda/cuda_dnn.cc"),
    internal("failed to create cublas handle: CUBLAS_STATUS_NOT_INITIALIZED"),
    internal("failed to create cublas handle: CUBLAS_STATUS_ALLOC_FAILED"),
    tf.errors.UnknownError(None, None, "Failed to get convolution algorithm. This is probably "
                           "because cuDNN failed to initialize"),
]  # fmt: skip
OTHERS = [
    exhausted("Received message larger than max (6 vs. 4)"),
    exhausted("Quota exceeded for quota metric"),
    exhausted("/tmp/model.h5; No space left on device"),
    internal("CUDA error: an illegal memory access was encountered"),
    internal("Blas GEMM launch failed"),
    tf.errors.InvalidArgumentError(None, None, "out of memory bounds"),
    ValueError("OOM"),
    RuntimeError("out of memory"),
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
    found = Training(Points([0], AMBIGUOUS[0])).run(ROWS)
    assert_same(found, Training(Points()).run(ROWS // 2))


def test_an_ambiguous_error_that_less_does_not_mend_comes_out_as_it_was():
    with pytest.raises(tf.errors.AbortedError) as raised:
        Training(Points(range(1000), AMBIGUOUS[0])).run(8)
    assert raised.value is AMBIGUOUS[0]


def test_something_is_left():
    assert left_bytes() > 2**20


def test_the_largest_variables_come_first():
    a, b = tf.Variable([1.0], name="a"), tf.Variable([1.0, 2.0], name="b")
    assert [size for _, size in largest_variables({"x": [a, b]})] == [8, 4]


class Points:
    """Counts places where memory may run out, and lets it run out at some."""

    def __init__(self, fail=(), error=OUT_OF_MEMORY[0]):
        self.fail, self.error, self.count = set(fail), error, 0

    def __call__(self):
        # Aux is told apart by an abstract trace, which needs no memory.
        if not tf.executing_eagerly():
            return
        self.count += 1
        if self.count - 1 in self.fail:
            raise self.error


class Training:
    """A loss with an embedding and terms, in which memory may run out at some points."""

    def __init__(self, point):
        rng = np.random.default_rng(0)
        self.point = point
        self.table = tf.Variable(rng.normal(size=(7, 5)), name="table")
        self.kernel = tf.Variable(rng.normal(size=(5,)), name="kernel")
        self.batch = {
            "ids": tf.constant(rng.integers(0, 7, ROWS)),
            "mask": tf.constant((rng.uniform(size=ROWS) < 0.7).astype(float)),
        }

    def loss_fn(self, batch):
        @tf.custom_gradient
        def passing(x):
            self.point()

            def backward(gradient):
                self.point()
                return gradient

            return tf.identity(x), backward

        hidden = passing(tf.tanh(tf.gather(self.table, batch["ids"])))
        errors = tf.linalg.matvec(hidden, self.kernel) ** 2
        tokens = tf.reduce_sum(errors * batch["mask"]) / tf.reduce_sum(batch["mask"])
        return {"tokens": tokens, "penalty": tf.reduce_sum(self.kernel**2)}, errors

    def weight(self, batch):
        self.point()
        return {"tokens": tf.reduce_sum(batch["mask"]), "penalty": None}

    def run(self, size, batch=None, **options):
        options |= {} if size is None else {"microbatch_size": size}
        (loss, aux), gradients = vb.value_and_gradients(
            self.loss_fn,
            self.batch if batch is None else batch,
            [self.table, self.kernel],
            weight=self.weight,
            has_aux=True,
            **options,
        )
        return [x.numpy() for x in (loss, aux, *map(tf.convert_to_tensor, gradients))]


def run(size, point=None, **options):
    return Training(point or Points()).run(size, **options)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("seed", tiered(range(25), range(4), "test_injection.py has its points"))
def test_a_window_that_ran_out_is_that_of_the_smaller_size(seed):
    chance = random.Random(seed)
    size = chance.choice([24, 12, 8, 7, 5])
    undisturbed = Points()
    run(size, undisturbed)
    point = Points([chance.randrange(undisturbed.count)], chance.choice(OUT_OF_MEMORY))
    found = run(size, point)
    assert point.count > undisturbed.count
    largest = -(-ROWS // -(-ROWS // size))
    assert_same(found, run(largest // 2))


def test_other_errors_come_out_as_they_are():
    point = Points([1], OTHERS[0])
    with pytest.raises(tf.errors.ResourceExhaustedError, match="larger than max"):
        run(8, point)
    assert point.count == 2


def test_it_may_run_out_again_and_again(caplog):
    with caplog.at_level(logging.WARNING, "virtualbatch"):
        found = run(ROWS, Points([1, 4, 9]))
    assert_same(found, run(3))
    assert len(caplog.messages) == 3


def test_the_smaller_size_is_kept_for_the_variables():
    training = Training(Points([1]))
    training.run(ROWS)
    before = training.point.count
    second = training.run(ROWS)
    undisturbed = Points()
    assert_same(second, run(ROWS // 2, undisturbed))
    assert training.point.count - before == undisturbed.count


def test_it_grows_again_when_asked(untimed_plans):
    # A size planned by time may be odd, and is not back after one doubling.
    training = Training(Points())
    size = Auto(grow_after=1, memory_limit="1GiB")
    first = training.run(size)
    training.point.fail = {training.point.count + 1}
    training.run(size)
    assert_same(training.run(size), first)


def test_a_number_of_micro_batches_is_recovered_too():
    assert_same(run(None, Points([3]), accumulation_steps=2), run(6))


def test_micro_batches_of_a_window_are_cut_further():
    def cut(*stops):
        batch = Training(None).batch
        return vb.Window(
            {name: x[a:b] for name, x in batch.items()}
            for a, b in zip((0, *stops), stops, strict=False)
        )

    found = run(None, Points([4]), batch=cut(10, 14, 24))
    assert_same(found, run(None, batch=cut(5, 10, 14, 19, 24)))


def test_nothing_is_left_to_halve():
    point = Points(range(1000), OUT_OF_MEMORY[1])
    with pytest.raises(MemoryError, match=r"one row must fit.* 64\.0 GiB more were asked for") as e:
        run(ROWS, point)
    assert "table:0 (280 B), kernel:0 (40 B)" in str(e.value)
    for text in (" left. Nothing of this update", "checkpointing", "bfloat16", "rows shorter"):
        assert text in str(e.value)
    assert isinstance(e.value.__cause__, tf.errors.ResourceExhaustedError)
    assert point.count == 5


def test_inside_a_graph_the_error_comes_out():
    def loss_fn(x):
        raise OUT_OF_MEMORY[0]

    run = tf.function(
        lambda x: vb.value_and_gradients(loss_fn, x, [tf.Variable(1.0)], microbatch_size=2),
        autograph=False,
    )
    with pytest.raises(tf.errors.ResourceExhaustedError):
        run(tf.ones([4, 1]))


def test_windows_that_really_run_out_of_memory():
    script = Path(__file__).with_name("limited.py")
    child = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout)
    text = results.pop("one row")
    assert results.keys() == {"forward", "backward", "weight"}
    assert all(size in (32, 16, 8, 4) for size in results.values()), results
    assert "Got one row, and 4.0 GiB more were asked for with " in text
