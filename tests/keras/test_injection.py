"""Memory that runs out at any point of `fit`: every point gives the same training.

A point is a batch, a micro-batch and a phase: forward, backward, the metrics that accumulate, and
the update where it is part of a program. On JAX a program has no inside for Python: it runs to its
end, its arguments are gone, and then it fails.
"""

import functools
import random
from collections import Counter

import keras
import pytest
from tests.keras.backends import BACKEND
from tests.keras.running_out import X, Y, assert_same, out_of_memory, state

import virtualbatch.keras as vb

SIZES = (24, 12, 8)
# Of other rows each: a program that has fitted once is trusted, and keeps nothing to go back to.
BATCHES = (24, 20)
# Those of two dense layers and of BatchNorm.
VARIABLES = 6
# Keras on PyTorch moves weights one by one, in Python: an update that has begun is not made again.
PHASES = {
    "tensorflow": ("forward", "backward", "accumulate", "update"),
    "torch": ("forward", "backward", "accumulate"),
    "jax": ("window",),
}[BACKEND]


class Points:
    """Counts the points of each phase as they run, and lets some run out of memory."""

    def __init__(self, phase=None, fail=None):
        self.phase, self.fail = phase, fail
        self.count = Counter()

    def __call__(self, phase):
        number = self.count[phase]
        self.count[phase] += 1
        if (phase, number) == (self.phase, self.fail):
            if BACKEND == "tensorflow":
                # What TensorFlow makes a ResourceExhaustedError of.
                raise MemoryError("OOM when allocating tensor")
            raise out_of_memory()

    def at(self, phase, x):
        """x, in whose computation the point is."""
        if BACKEND == "tensorflow":
            import tensorflow as tf

            def run(value):
                self(phase)
                return value

            found = tf.numpy_function(run, [x], x.dtype)
            found.set_shape(x.shape)
            return found
        # Keras builds metrics on tensors without data.
        if BACKEND == "torch" and x.device.type != "meta":
            self(phase)
        return x


class Failing(keras.layers.Layer):
    """Passes through, by a point in the forward and one in the backward pass."""

    def __init__(self, points):
        super().__init__()
        self.points = points

    def call(self, x, training=False):
        if not training or BACKEND == "jax":
            return x
        if BACKEND == "torch":
            if x.requires_grad:
                self.points("forward")
                x.register_hook(lambda gradient: self.points("backward"))
            return x
        import tensorflow as tf

        @tf.custom_gradient
        def passing(x):
            def backward(gradient):
                return self.points.at("backward", gradient)

            return self.points.at("forward", x), backward

        return passing(x)


class Metric(keras.metrics.Mean):
    """The mean of what was predicted; it has a point."""

    def __init__(self, points):
        super().__init__()
        self.points = points

    def update_state(self, y, found, sample_weight=None):
        super().update_state(self.points.at("accumulate", found))


class Optimizer(keras.optimizers.SGD):
    """Has a point at each variable."""

    def __init__(self, points):
        super().__init__(0.05, momentum=0.9, nesterov=True)
        self.points = points

    def update_step(self, gradient, variable, learning_rate):
        if BACKEND == "tensorflow":
            gradient = self.points.at("update", gradient)
        super().update_step(gradient, variable, learning_rate)


class Model(keras.Sequential):
    """On JAX its windows fail after they have run."""

    points = None

    def make_train_function(self, force=False):
        super().make_train_function(force=force)
        if BACKEND != "jax" or getattr(self.train_function, "fails", False):
            return
        run = self.train_function

        def train_function(*given):
            result = run(*given)
            self.points("window")
            return result

        train_function.fails = True
        self.train_function = train_function


def trained(points, *sizes):
    """Logs and values after some batches, each with a size; sizes stay until another is given."""
    keras.utils.set_random_seed(1)
    model = Model(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.BatchNormalization(momentum=0.7),
            keras.layers.Dropout(0.3, seed=3),
            Failing(points),
            keras.layers.Dense(1),
        ]
    )
    model.points = points
    model.compile(
        optimizer=Optimizer(points),
        loss="mse",
        metrics=[Metric(points)],
        jit_compile=BACKEND == "jax",
    )
    logs = []
    for number, size in enumerate(sizes):
        if number == 0 or size != sizes[number - 1]:
            vb.accumulate(model, microbatch_size=size)
        rows = slice(sum(BATCHES[:number]), sum(BATCHES[: number + 1]))
        logs.append(model.train_on_batch(X[rows], Y[rows, None] * 1.0, return_dict=True))
    return logs, state(model)


@functools.cache
def undisturbed(*sizes):
    """Logs and values where no point fails."""
    return trained(Points(), *sizes)


def each(size, phase):
    """Points of a phase in a batch: both are cut into as many micro-batches."""
    return {"update": VARIABLES, "window": 1}.get(phase, -(-BATCHES[0] // size))


def points_of(phase):
    """(size, number of the point in its phase): all there are."""
    # Of a whole batch, Keras on PyTorch counts metrics after the update.
    sizes = SIZES[1:] if (BACKEND, phase) == ("torch", "accumulate") else SIZES
    return [(size, i) for size in sizes for i in range(len(BATCHES) * each(size, phase))]


def points_in_tiers():
    """Arguments of the test: of each phase one point that is drawn, then all others."""
    draw = random.Random(0)
    further = pytest.mark.thorough("one point of each phase is drawn for the quick tier")
    for phase in PHASES:
        points = points_of(phase)
        drawn = draw.randrange(len(points))
        for number, point in enumerate(points):
            yield pytest.param(phase, *point, marks=() if number == drawn else further)


@pytest.mark.parametrize(("phase", "size", "fail"), [*points_in_tiers()])
def test_any_point_may_run_out(phase, size, fail):
    points = Points(phase, fail)
    logs, after = trained(points, *[size] * len(BATCHES))
    assert points.count[phase] > fail + 1
    failed = fail // each(size, phase)
    smaller = min(size, BATCHES[failed]) // 2
    sizes = [size if number < failed else smaller for number in range(len(BATCHES))]
    due, due_after = undisturbed(*sizes)
    assert logs == due
    assert_same(after, due_after)


def test_points_are_as_many_as_there_are_micro_batches():
    points = Points()
    trained(points, 8)
    assert points.count == Counter({phase: each(8, phase) for phase in PHASES})
