"""Checks of two workers; a program of its own, because TensorFlow reads TF_CONFIG when it starts.

The arguments are the number of this worker, both ports and the name of a check. What a check
returns is printed as JSON, after "## ".
"""

import json
import os
import sys
import time

import numpy as np
import tensorflow as tf
from tests.tensorflow.modes import arrays, uncut
from tests.tensorflow.replicated import CUTS, collectives, parts, three_terms

import virtualbatch.tensorflow as vb


def three_terms_of_all_workers(strategy, worker):
    """Errors, relative to the largest entry, and reductions, for each cut."""
    alone, _, batch, variables = three_terms()
    due_loss, due = uncut(alone, batch, variables)
    with strategy.scope():
        terms, weight, _, variables = three_terms()

    def replica(batch):
        loss, gradients = vb.value_and_gradients(
            terms, batch, variables, microbatch_size=4, weight=weight
        )
        context = tf.distribute.get_replica_context()
        return loss, context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)

    spec = tf.nest.map_structure(lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype), batch)
    step = tf.function(
        lambda batch: strategy.run(replica, args=(batch,)), input_signature=[spec], autograph=False
    )
    found = {}
    for name, counts in CUTS.items():
        loss, gradients = step(parts(batch, counts)[worker])
        pairs = zip(arrays(gradients), due, strict=True)
        off = max(np.abs(x - y).max() / np.abs(y).max() for x, y in pairs)
        found[name] = [float(loss).hex(), abs(float(loss) / due_loss - 1), off]

    def window(batch):
        return vb.value_and_gradients(terms, batch, variables, microbatch_size=4, weight=weight)

    alone = tf.function(lambda batch: strategy.run(window, args=(batch,)), input_signature=[spec])
    return found, collectives(alone.get_concrete_function().graph)


def failing(strategy, worker, fail):
    """The error of this worker, and after how many seconds it came."""
    with strategy.scope():
        kernel = tf.Variable(np.ones((3, 1)))

    def loss_fn(x):
        return tf.reduce_mean((x @ kernel) ** 2)

    def replica(x):
        if worker == 1:
            x = fail(x)
        return vb.value_and_gradients(loss_fn, x, [kernel], microbatch_size=2)[0]

    step = tf.function(lambda x: strategy.run(replica, args=(x,)))
    began = time.monotonic()
    try:
        return ["no error", float(step(tf.ones([6, 3], tf.float64)))]
    except Exception as error:
        return [type(error).__name__, str(error), time.monotonic() - began]


def raising_in_a_step(strategy, worker):
    def fail(x):
        check = tf.debugging.Assert(tf.reduce_sum(x) < 0, ["a fault of worker 1"])
        with tf.control_dependencies([check]):
            return tf.identity(x)

    return failing(strategy, worker, fail)


def raising_and_staying(strategy, worker):
    found = raising_in_a_step(strategy, worker)
    # Longer than a worker may go without a sign of life.
    time.sleep(60 * worker)
    return found


def raising_while_traced(strategy, worker):
    def fail(x):
        raise KeyError("a fault of worker 1")

    return failing(strategy, worker, fail)


def dying(strategy, worker):
    def fail(x):
        return tf.py_function(lambda x: os._exit(9), [x], tf.float64)

    return failing(strategy, worker, fail)


if __name__ == "__main__":
    number, check = int(sys.argv[1]), globals()[sys.argv[4]]
    workers = [f"127.0.0.1:{port}" for port in sys.argv[2:4]]
    task = {"type": "worker", "index": number}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
    result = check(tf.distribute.MultiWorkerMirroredStrategy(), number)
    print("##", json.dumps(result), flush=True)
    # Leaving in order would wait for a worker that is gone.
    os._exit(0)
