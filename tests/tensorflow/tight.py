"""A plan where a graph does not fit, in a process of little address space; prints what came."""

import json
import logging
import os
import resource
import sys
from pathlib import Path

import tensorflow as tf

import virtualbatch.tensorflow as vb

# Less than the threads of a graph may need. A row of this program takes about two MiB.
ROOM = 60 * 2**20


def loss_fn(x):
    return tf.reduce_mean(tf.tanh(tf.tile(x @ kernel, [1, 2**13])))


lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("virtualbatch").addHandler(handler)
kernel, batch = tf.Variable(tf.ones([64, 16])), tf.ones([256, 64])
# What these operations load is there before the limit.
vb.value_and_gradients(loss_fn, batch[:4], [kernel], microbatch_size=2, check=False)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
plan = vb.plan(loss_fn, batch, [kernel])
# TensorFlow does not always end in so little.
resource.setrlimit(resource.RLIMIT_AS, before)
intact = bool(tf.reduce_all(kernel == 1))
results = {"plan": json.loads(plan.to_json()), "log": lines, "intact": intact}
json.dump(results, sys.stdout)
