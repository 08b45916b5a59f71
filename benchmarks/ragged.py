"""What packing saves on ragged text: a window padded, trimmed in the order of the rows, and packed.

A transformer of three layers tags the tokens of 128 rows that are padded to 256; lengths are
log-normal. All contenders compute the gradient of the whole batch, and it is compared with that of
the padded one in the same run. They run in turns in one process an engine, packing included; the
padded loop is compiled as a whole where that is faster, so it is the best of its engine.

Usage: python benchmarks/ragged.py [--engines torch keras-jax] [--rounds 7] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from virtualbatch import Window, pack

ENGINES = ["torch", "tensorflow", "jax", "keras-torch", "keras-tensorflow", "keras-jax"]
ROWS, LENGTH, MICROBATCH_SIZE = 128, 256, 16
TOKENS = MICROBATCH_SIZE * LENGTH
LAYERS, WIDTH, HEADS, WORDS, CLASSES = 3, 128, 4, 1000, 32
# Lengths of compiled engines: multiples of this, so four shapes.
ROUND_TO = 64
PADDED, TRIMMED, PACKED, EQUAL = (
    "padded",
    "trimmed, not sorted",
    "packed",
    f"packed, round_to={ROUND_TO}",
)

Contenders = dict[str, Callable[[], list[np.ndarray]]]


def data() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Ids and labels, padded by 0, and the lengths of their rows."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(60), 0.7, ROWS), 4, LENGTH).astype(int)
    lengths[0] = LENGTH
    rng.shuffle(lengths)
    ids = rng.integers(1, WORDS, (ROWS, LENGTH)) * (np.arange(LENGTH) < lengths[:, None])
    labels = rng.integers(0, CLASSES, (ROWS, LENGTH))
    return {"ids": ids.astype("int32"), "labels": labels.astype("int32")}, lengths


def weights() -> dict[str, np.ndarray]:
    """Parameters of the transformer, by name."""
    rng = np.random.default_rng(1)
    head = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "words": (WORDS, WIDTH),
        "places": (LENGTH, WIDTH),
        "classes": (WIDTH, CLASSES),
    }
    for k in range(LAYERS):
        shapes |= {f"{name}{k}": (WIDTH, HEADS, head) for name in "qkv"}
        shapes |= {f"o{k}": (HEADS, head, WIDTH)}
        shapes |= {f"up{k}": (WIDTH, 4 * WIDTH), f"down{k}": (4 * WIDTH, WIDTH)}
    return {
        name: (rng.normal(size=shape) * WIDTH**-0.5).astype("float32")
        for name, shape in shapes.items()
    }


def token_loss(f: Any, w: dict[str, Any], batch: dict[str, Any]) -> Any:
    """Mean cross-entropy of the tokens; no token sees padding.

    Args:
        f: functions of the framework: `einsum`, `softmax`, `log_softmax`, `relu`, `rsqrt`, `take`,
            `mean`, `sum`, `one_hot` and `floats`.
        w: parameters.
        batch: ids and labels.
    """

    def norm(x: Any) -> Any:
        return x * f.rsqrt(f.mean(x * x) + 1e-6)

    ids = batch["ids"]
    valid = f.floats(ids != 0)
    unseen = ((valid - 1) * 1e9)[:, None, None, :]
    x = f.take(w["words"], ids) + w["places"][: ids.shape[1] or f.length(ids)]
    for k in range(LAYERS):
        y = norm(x)
        q, key, v = (f.einsum("btd,dhk->bhtk", y, w[f"{name}{k}"]) for name in "qkv")
        scores = f.einsum("bhtk,bhsk->bhts", q, key) * (WIDTH // HEADS) ** -0.5 + unseen
        seen = f.einsum("bhts,bhsk->bhtk", f.softmax(scores), v)
        x = x + f.einsum("bhtk,hkd->btd", seen, w[f"o{k}"])
        y = f.relu(f.einsum("btd,de->bte", norm(x), w[f"up{k}"]))
        x = x + f.einsum("bte,ed->btd", y, w[f"down{k}"])
    logits = f.log_softmax(f.einsum("btd,dc->btc", norm(x), w["classes"]))
    chosen = f.sum(logits * f.one_hot(batch["labels"]), -1)
    return -f.sum(chosen * valid, None) / f.sum(valid, None)


def trimmed(batch: dict[str, Any], lengths: np.ndarray, round_to: int = 1) -> Window:
    """Micro-batches of neighbouring rows, each trimmed to its longest."""
    starts = range(0, ROWS, MICROBATCH_SIZE)
    cut = [(start, start + MICROBATCH_SIZE) for start in starts]
    longest = [-(-int(lengths[a:b].max()) // round_to) * round_to for a, b in cut]
    return Window(
        {name: leaf[a:b, :n] for name, leaf in batch.items()}
        for (a, b), n in zip(cut, longest, strict=True)
    )


def on_torch(threads: int) -> Contenders:
    import torch
    from torch.nn import functional

    import virtualbatch.torch as vb

    torch.set_num_threads(threads)

    class Functions:
        einsum, relu, rsqrt = torch.einsum, torch.relu, torch.rsqrt
        softmax = staticmethod(lambda x: torch.softmax(x, -1))
        log_softmax = staticmethod(lambda x: torch.log_softmax(x, -1))
        take = staticmethod(lambda x, ids: functional.embedding(ids, x))
        mean = staticmethod(lambda x: x.mean(-1, keepdim=True))
        sum = staticmethod(lambda x, axis: x.sum() if axis is None else x.sum(axis))
        one_hot = staticmethod(lambda x: functional.one_hot(x.long(), CLASSES).float())
        floats = staticmethod(lambda x: x.float())

    module = torch.nn.ParameterDict(
        {k: torch.nn.Parameter(torch.tensor(v)) for k, v in weights().items()}
    )
    batch, lengths = data()
    batch = {name: torch.as_tensor(leaf) for name, leaf in batch.items()}

    def gradients(given: Any, **size: Any) -> list[np.ndarray]:
        module.zero_grad()
        vb.backward(
            lambda batch: token_loss(Functions, module, batch),
            given,
            module=module,
            weight=lambda batch: (batch["ids"] != 0).sum(),
            **size,
        )
        return [parameter.grad.numpy() for parameter in module.values()]

    return {
        PADDED: lambda: gradients(batch, microbatch_size=MICROBATCH_SIZE),
        TRIMMED: lambda: gradients(trimmed(batch, lengths)),
        PACKED: lambda: gradients(pack(batch, lengths, microbatch_tokens=TOKENS)),
        EQUAL: lambda: gradients(pack(batch, lengths, microbatch_tokens=TOKENS, round_to=ROUND_TO)),
    }


def on_tensorflow(threads: int) -> Contenders:
    import tensorflow as tf

    import virtualbatch.tensorflow as vb

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    class Functions:
        einsum, relu, rsqrt = tf.einsum, tf.nn.relu, tf.math.rsqrt
        softmax, log_softmax = tf.nn.softmax, tf.nn.log_softmax
        take = staticmethod(tf.gather)
        mean = staticmethod(lambda x: tf.reduce_mean(x, -1, keepdims=True))
        sum = staticmethod(tf.reduce_sum)
        one_hot = staticmethod(lambda x: tf.one_hot(x, CLASSES))
        floats = staticmethod(lambda x: tf.cast(x, tf.float32))
        length = staticmethod(lambda ids: tf.shape(ids)[1])

    w = {name: tf.Variable(value) for name, value in weights().items()}
    batch, lengths = data()
    batch = {name: tf.constant(leaf) for name, leaf in batch.items()}

    # One trace for every shape.
    @tf.function(input_signature=[{name: tf.TensorSpec([None, None], tf.int32) for name in batch}])
    def compiled(batch: Any) -> Any:
        return token_loss(Functions, w, batch)

    def loss(batch: Any) -> Any:
        return token_loss(Functions, w, batch)

    def valid(batch: Any) -> Any:
        return tf.math.count_nonzero(batch["ids"])

    @tf.function
    def whole(batch: Any) -> Any:
        return vb.value_and_gradients(
            loss, batch, list(w.values()), microbatch_size=MICROBATCH_SIZE, weight=valid
        )[1]

    def gradients(window: Any) -> list[np.ndarray]:
        found = vb.value_and_gradients(compiled, window, list(w.values()), weight=valid)[1]
        return dense(found)

    def dense(found: Any) -> list[np.ndarray]:
        return [tf.convert_to_tensor(gradient).numpy() for gradient in found]

    return {
        PADDED: lambda: dense(whole(batch)),
        TRIMMED: lambda: gradients(trimmed(batch, lengths)),
        PACKED: lambda: gradients(pack(batch, lengths, microbatch_tokens=TOKENS)),
        EQUAL: lambda: gradients(pack(batch, lengths, microbatch_tokens=TOKENS, round_to=ROUND_TO)),
    }


def on_jax(threads: int) -> Contenders:
    import jax
    import jax.numpy as jnp

    import virtualbatch.jax as vb

    class Functions:
        einsum, relu, rsqrt = jnp.einsum, jax.nn.relu, jax.lax.rsqrt
        softmax, log_softmax = jax.nn.softmax, jax.nn.log_softmax
        take = staticmethod(lambda x, ids: x[ids])
        mean = staticmethod(lambda x: x.mean(-1, keepdims=True))
        sum = staticmethod(jnp.sum)
        one_hot = staticmethod(lambda x: jax.nn.one_hot(x, CLASSES))
        floats = staticmethod(lambda x: x.astype("float32"))

    w = jax.tree.map(jnp.asarray, weights())
    batch, lengths = data()
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(w: Any, batch: Any) -> Any:
        return token_loss(Functions, w, batch)

    def valid(batch: Any) -> Any:
        return (batch["ids"] != 0).sum()

    whole = jax.jit(vb.value_and_grad(loss, microbatch_size=MICROBATCH_SIZE, weight=valid))
    # The loss is compiled, once a shape; the window is not.
    window = vb.value_and_grad(jax.jit(loss), weight=valid)

    def listed(found: Any) -> list[np.ndarray]:
        return [np.asarray(found[1][name]) for name in w]

    return {
        PADDED: lambda: listed(whole(w, batch)),
        TRIMMED: lambda: listed(window(w, trimmed(batch, lengths, ROUND_TO))),
        EQUAL: lambda: listed(
            window(w, pack(batch, lengths, microbatch_tokens=TOKENS, round_to=ROUND_TO))
        ),
    }


def on_keras(threads: int) -> Contenders:
    import keras
    from keras import layers, ops

    import virtualbatch.keras as vb

    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(threads)

    class Places(layers.Layer):
        """Adds a learned vector for each place, for as many as there are."""

        def build(self, shape: Any) -> None:
            self.places = self.add_weight(shape=(LENGTH, shape[-1]))
            self.supports_masking = True

        def compute_output_shape(self, shape: Any) -> Any:
            return shape

        def call(self, x: Any) -> Any:
            return x + self.places[: ops.shape(x)[1]]

    def model() -> keras.Model:
        keras.utils.set_random_seed(0)
        ids = keras.Input((None,), dtype="int32")
        x = Places()(layers.Embedding(WORDS, WIDTH, mask_zero=True)(ids))
        for _ in range(LAYERS):
            y = layers.LayerNormalization()(x)
            x = layers.Add()([x, layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y)])
            y = layers.Dense(4 * WIDTH, activation="relu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, layers.Dense(WIDTH)(y)])
        found = keras.Model(ids, layers.Dense(CLASSES)(layers.LayerNormalization()(x)))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        found.compile(keras.optimizers.SGD(1.0), loss)
        return found

    def lengths(ids: Any) -> Any:
        return ops.sum(ops.cast(ids != 0, "int32"), 1)

    batch, _ = data()

    def contender(**sizes: Any) -> Callable[[], list[np.ndarray]]:
        trained = model()
        vb.accumulate(trained, **sizes)
        start = trained.get_weights()

        def update() -> list[np.ndarray]:
            """One update of `fit`; what it changed the first time is the gradient."""
            trained.train_on_batch(batch["ids"], batch["labels"])
            return [a - b for a, b in zip(start, trained.get_weights(), strict=True)]

        return update

    return {
        PADDED: contender(microbatch_size=MICROBATCH_SIZE),
        PACKED: contender(microbatch_tokens=TOKENS, lengths=lengths),
    }


def measured(engine: str, rounds: int, threads: int) -> dict[str, Any]:
    """Milliseconds of each contender, how much faster, and how far gradients differ."""
    engine, _, backend = engine.partition("-")
    # Read when Keras is imported.
    os.environ["KERAS_BACKEND"] = backend or "tensorflow"
    contenders = globals()[f"on_{engine}"](threads)
    found = {name: run() for name, run in contenders.items()}
    # Some gradients of Keras' attention are zero but for rounding, so all share one measure.
    largest = max(np.abs(gradient).max() for gradient in found[PADDED])
    off = {
        name: max(
            float(np.abs(a - b).max() / largest)
            for a, b in zip(gradients, found[PADDED], strict=True)
        )
        for name, gradients in found.items()
    }
    if max(off.values()) > 1e-5:
        raise AssertionError(f"gradients differ: {off}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        # Whoever comes first in a round may find other caches.
        for name in sorted(contenders, reverse=bool(turn % 2)):
            start = time.perf_counter()
            contenders[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {
            "ms": float(np.median(found)),
            "spread": [min(found), max(found)],
            "faster": float(np.median(np.divide(times[PADDED], found))),
            "gradient off by": off[name],
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one, arguments.rounds, arguments.threads)))
        return
    _, lengths = data()
    print(
        f"{ROWS} rows padded to {LENGTH}, {lengths.mean():.0f} tokens each on average; "
        f"micro-batches of {MICROBATCH_SIZE} padded rows or {TOKENS} tokens"
    )
    results = {}
    for engine in arguments.engines:
        options = ["--rounds", str(arguments.rounds), "--threads", str(arguments.threads)]
        child = subprocess.run(
            [sys.executable, __file__, "--one", engine, *options],
            env=os.environ
            | {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": str(arguments.threads)},
            capture_output=True,
            text=True,
            timeout=460,
            check=False,
        )
        if child.returncode:
            raise RuntimeError(f"{engine} failed:\n{child.stderr}")
        results[engine] = json.loads(child.stdout.splitlines()[-1])
        print(
            f"\n{engine:30}{'ms':>8}{'fastest':>9}{'slowest':>9}{'times as fast':>15}{'off by':>10}"
        )
        for name, found in results[engine].items():
            low, high = found["spread"]
            print(
                f"{name:30}{found['ms']:8.0f}{low:9.0f}{high:9.0f}{found['faster']:15.2f}"
                f"{found['gradient off by']:10.1e}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
