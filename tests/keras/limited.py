"""Updates that really run out of memory, in a process of little of it; prints what came.

What is short is address space, or what TensorFlow's own allocator gives where
TF_CPU_BFC_MEM_LIMIT_IN_MB says so: TensorFlow ends a process that has no room for its threads.

Each case needs memory in proportion to the rows in another phase of a micro-batch, or any amount in
the update. What it trains is compared, bit by bit, with a run that used the final size from the
start, before there was a limit.
"""

import json
import os
import resource
import sys
from pathlib import Path

import keras
import numpy as np

import virtualbatch.keras as vb

ROWS, WIDTH = 128, 2**18
# Room for a MiB, some of it twice, for each of a few rows, beside what was there.
ROOM = 40 * 2**20
# The allocator keeps to its limit from the start, so what comes before must need little.
BY_ALLOCATOR = "TF_CPU_BFC_MEM_LIMIT_IN_MB" in os.environ
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 8)).astype("float32")
Y = X.sum(1, keepdims=True)


def needed(x, really):
    """Zeros of the shape of x; needs WIDTH numbers for every row, if really."""
    if not really:
        return keras.ops.zeros_like(x)
    # What is sorted is written out by every compiler, and nothing here is a constant, for which
    # TensorFlow would take memory, and wait for it, before it runs.
    wide = keras.ops.sort(keras.ops.broadcast_to(x[:, :1], (keras.ops.shape(x)[0], WIDTH)))
    return 0 * x + 0 * keras.ops.max(wide)


class Needs(keras.layers.Layer):
    """Passes through."""

    def __init__(self, phase):
        super().__init__()
        self.phase = phase

    def call(self, x):
        if self.phase == "forward":
            return x + needed(keras.ops.stop_gradient(x), True)
        return needed_by_gradients(x) if self.phase == "backward" else x


def needed_by_gradients(x):
    """x, whose gradient needs WIDTH numbers for every row."""
    if keras.backend.backend() == "torch":
        # `custom_gradient` of Keras runs the forward pass again if that ran out of memory.
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient + needed(gradient, True))
        return x

    @keras.ops.custom_gradient
    def passing(x):
        def gradient(*found, upstream=None):
            upstream = found[0] if upstream is None else upstream
            return upstream + needed(upstream, True)

        return x, gradient

    return passing(x)


class Metric(keras.metrics.Mean):
    """The mean of what was predicted."""

    def __init__(self, phase):
        super().__init__()
        self.phase = phase

    def update_state(self, y, found, sample_weight=None):
        super().update_state(found + needed(found, self.phase == "accumulate"))


class Optimizer(keras.optimizers.SGD):
    """Needs memory after the first variable has moved."""

    def __init__(self, phase):
        super().__init__(0.1, momentum=0.9)
        self.phase = phase
        self.moved = 0

    def update_step(self, gradient, variable, learning_rate):
        self.moved += 1
        more = needed(gradient, self.phase == "update" and len(gradient.shape) == 2)
        super().update_step(gradient + more, variable, learning_rate)


def model(phase, size):
    keras.utils.set_random_seed(0)
    found = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=1),
            Needs(phase),
            keras.layers.Dense(1),
        ]
    )
    found.compile(optimizer=Optimizer(phase), loss="mse", metrics=[Metric(phase)])
    found.optimizer.build(found.trainable_variables)
    vb.accumulate(found, microbatch_size=size)
    return found


def state(found):
    variables = [*found.variables, *found.optimizer.variables, *found.metrics_variables]
    return [keras.ops.convert_to_numpy(variable.value).tobytes() for variable in variables]


def trained(phase, size, verb):
    found = model(phase, size)
    if verb == "fit":
        logs = found.fit(X, Y, batch_size=ROWS, shuffle=False, verbose=0).history
    else:
        logs = found.train_on_batch(X, Y, return_dict=True)
    return [repr(logs), *state(found)]


def refused(phase):
    """What comes where no size fits: the error, and whether the model is as before."""
    found = model(phase, 4)
    # Keras makes the metrics when the first batch has been seen.
    weights = [*found.variables, *found.optimizer.variables]
    before = [np.array(keras.ops.convert_to_numpy(v.value)) for v in weights]
    try:
        found.train_on_batch(X, Y)
    except Exception as error:
        after = [keras.ops.convert_to_numpy(v.value) for v in weights]
        intact = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        return {"error": type(error).__name__, "text": str(error), "intact": intact}
    return {"error": None, "text": "", "intact": False}


def limit():
    if BY_ALLOCATOR:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    held = pages * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))


phase, verb = sys.argv[1:]
SIZES = (32, 16, 8, 4)
if phase in ("forward", "backward", "accumulate"):
    if not BY_ALLOCATOR:
        # What a program loads is there before the limit.
        trained(phase, SIZES[-1], verb)
    wide, WIDTH = WIDTH, 1
    due = {size: trained(phase, size, verb) for size in SIZES}
    WIDTH = wide
    limit()
    # Cut from the start: of a whole batch, Keras on PyTorch counts metrics after the update.
    got = trained(phase, 2 * SIZES[0], verb)
    result = next((size for size in SIZES if due[size] == got), None)
else:
    trained("none", 4, verb)
    WIDTH = 2**28
    limit()
    result = refused("forward" if phase == "one row" else phase)
json.dump(result, sys.stdout)
