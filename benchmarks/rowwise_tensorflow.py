"""What `rowwise` costs in TensorFlow beside the window and the uncut batch: time, and peak memory.

One loss that could be cut, a transformer's cross-entropy in a graph, so that all three give the
same gradient: 256 rows in micro-batches of 32, in interleaved rounds, on one thread. Peaks are the
resident memory of a child above what it held before, of a graph with a contrastive loss, at 4 and
at 64 micro-batches of 16 rows; the loss runs in blocks, so that nothing grows but the embeddings.

Usage: python benchmarks/rowwise_tensorflow.py [--rounds 15] [--json FILE]
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from command import apart, parser_of, save

import virtualbatch.tensorflow as vb
from virtualbatch.bench.children import FREED_AT_ONCE, tell
from virtualbatch.bench.rounds import in_rounds
from virtualbatch.demo.peak_memory import PeakMemory

ROWS, SIZE, WIDTH, TOKENS, CLASSES = 256, 32, 64, 16, 10
ASKED = 1.40
# What grows by right: embeddings of 64 numbers, of which there are a few copies.
COUNTS, WIDE = (4, 64), 1024
_MIB = 1024**2


def variable(random: Any, *shape: int) -> tf.Variable:
    return tf.Variable(random.normal(size=shape) / np.sqrt(shape[0]), dtype=tf.float32)


class Transformer:
    """Two blocks of attention without normalisation."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        sizes = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)] * 2
        self.variables = [variable(random, *size) for size in [*sizes, (WIDTH, CLASSES)]]

    def __call__(self, x: Any) -> Any:
        for k in (0, 4):
            mixing, out, wide, narrow = self.variables[k : k + 4]
            query, key, value = tf.split(tf.einsum("ntd,de->nte", x, mixing), 3, -1)
            scores = tf.nn.softmax(tf.einsum("ntd,nsd->nts", query, key) / WIDTH**0.5)
            x = x + tf.einsum("ntd,de->nte", scores @ value, out)
            x = x + tf.einsum("nte,ed->ntd", tf.nn.gelu(tf.einsum("ntd,de->nte", x, wide)), narrow)
        return tf.reduce_mean(x, 1) @ self.variables[-1]


def mean_loss(scores: Any, labels: Any) -> Any:
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scores))


def ways(model: Transformer) -> dict[str, Callable[..., Any]]:
    """Each gives the gradients of rows and labels."""

    def taped(encode: Callable[[Any], Any]) -> Callable[..., Any]:
        def gradients(x: Any, labels: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = mean_loss(encode(x), labels)
            return tape.gradient(loss, model.variables)

        return gradients

    def window(x: Any, labels: Any) -> Any:
        return vb.value_and_gradients(
            lambda batch: mean_loss(model(batch[0]), batch[1]),
            (x, labels),
            model.variables,
            microbatch_size=SIZE,
        )[1]

    return {
        "uncut": tf.function(taped(model)),
        "window": tf.function(window),
        "rowwise": tf.function(taped(vb.rowwise(model, microbatch_size=SIZE))),
    }


def times(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way, round by round; asserts that they agree."""
    random = np.random.default_rng(1)
    x = tf.constant(random.normal(size=(ROWS, TOKENS, WIDTH)), tf.float32)
    labels = tf.constant(random.integers(0, CLASSES, ROWS))
    found = ways(Transformer())
    due = [g.numpy() for g in found["uncut"](x, labels)]

    def timed(way: Callable[..., Any]) -> float:
        start = time.process_time()
        for _ in range(3):
            gradients = [g.numpy() for g in way(x, labels)]
        seconds = time.process_time() - start
        for a, b in zip(gradients, due, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
        return seconds / 3

    return in_rounds({name: lambda way=way: timed(way) for name, way in found.items()}, rounds)


def peak_of(way: str, count: int) -> int:
    """Peak bytes of one contrastive gradient in a graph, in this process."""
    random, rows = np.random.default_rng(0), count * 16
    layers = [variable(random, *s) for s in [(256, WIDE), (WIDE, WIDE), (WIDE, 64)]]

    def encode(x: Any) -> Any:
        for layer in layers[:-1]:
            x = tf.nn.gelu(tf.einsum("ntd,de->nte", x, layer))
        return tf.math.l2_normalize(tf.reduce_mean(x, 1) @ layers[-1], 1)

    def block(part: Any, others: Any) -> Any:
        scores = 5.0 * part["z"] @ tf.transpose(others)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(part["row"], scores)

    if way == "rowwise":
        encode = vb.rowwise(encode, microbatch_size=16)
        block = vb.rowwise(block, microbatch_size=16)

    @tf.function
    def gradients(x: Any) -> Any:
        with tf.GradientTape() as tape:
            z = encode(x)
            loss = tf.reduce_mean(block({"z": z, "row": tf.range(rows)}, tf.roll(z, 1, 0)))
        return tape.gradient(loss, layers)

    x = tf.constant(random.normal(size=(rows, 8, 256)), tf.float32)
    [g.numpy() for g in gradients(x)]
    peak = PeakMemory()
    for _ in range(3):
        [g.numpy() for g in gradients(x)]
    return peak.stop()


def main() -> None:
    arguments = parser_of(__doc__, rounds=15).parse_args()
    # Threads that wait for each other on a shared machine measure the machine.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if arguments.one:
        way, count = arguments.one
        tell(peak_of(way, int(count)))
        return
    result: dict[str, Any] = {"seconds": times(arguments.rounds), "peak_bytes": {}}
    seconds = result["seconds"]
    for other in ("window", "uncut"):
        pairs = zip(seconds["rowwise"], seconds[other], strict=True)
        ratios = [a / b for a, b in pairs]
        low, _, high = statistics.quantiles(ratios)
        median = statistics.median(ratios)
        asked = "" if other == "uncut" else f", asked {ASKED:.2f}"
        verdict = "" if other == "uncut" else " ok" if median <= ASKED else " MISSED"
        print(f"rowwise / {other:7} {median:.2f} ({low:.2f} to {high:.2f}){asked}{verdict}")
    for way in ("uncut", "rowwise"):
        for count in COUNTS:
            found = apart(way, str(count), **FREED_AT_ONCE)
            result["peak_bytes"][f"{way} {count}"] = found
            print(f"{way:8} {count:3} micro-batches: {found / _MIB:6.1f} MiB", flush=True)
    save(arguments.json, result)


if __name__ == "__main__":
    main()
