"""Windows that really run out of memory, in a process of little address space; prints what came.

Each case needs memory in proportion to the rows in another phase of a micro-batch. The result is
compared, bit by bit, with one that used the final size from the start, before there was a limit.
"""

import json
import os
import resource
import sys
from pathlib import Path

import tensorflow as tf

import virtualbatch.tensorflow as vb

ROWS, WIDTH = 64, 2**21
# Room for 8 MiB for each of some 20 rows, beside what was there.
ROOM = 200 * 2**20


def needed(rows, really):
    if really:
        tf.reduce_sum(tf.ones([rows, WIDTH]))


def window(phase, size):
    """What a window gives, as bytes."""
    kernel = tf.Variable(tf.ones([8, 16]) / 8)

    @tf.custom_gradient
    def passing(x):
        needed(len(x), phase == "forward")

        def backward(gradient):
            needed(len(gradient), phase == "backward")
            return gradient

        return tf.identity(x), backward

    def weight(x):
        needed(len(x), phase == "weight")
        return len(x)

    x = tf.random.stateless_normal([ROWS, 8], [1, 2])
    loss, gradients = vb.value_and_gradients(
        lambda x: tf.reduce_mean(passing(tf.tanh(x @ kernel))),
        x,
        [kernel],
        weight=weight,
        microbatch_size=size,
    )
    return [loss.numpy().tobytes(), gradients[0].numpy().tobytes()]


def one_row_that_does_not_fit():
    kernel = tf.Variable(tf.ones([2, 1]))
    try:
        vb.value_and_gradients(
            lambda x: tf.reduce_mean(x @ kernel) * tf.reduce_mean(tf.ones([2**30])),
            tf.ones([4, 2]),
            [kernel],
            microbatch_size=4,
        )
    except MemoryError as error:
        return str(error)
    return "no error"


PHASES = ["forward", "backward", "weight"]
# What these sizes load, and what TensorFlow's allocator keeps of them, is there before the limit.
due = {(phase, size): window(phase, size) for phase in PHASES for size in (32, 16, 8, 4)}
pages = int(Path("/proc/self/statm").read_text().split()[0])
held = pages * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
results = {}
for phase in PHASES:
    got = window(phase, ROWS)
    results[phase] = next((size for size in (32, 16, 8, 4) if due[phase, size] == got), None)
results["one row"] = one_row_that_does_not_fit()
json.dump(results, sys.stdout)
