"""What `rowwise` costs in JAX: beside a window whose loss needs no other rows, and beside uncut.

A contrastive loss on pairs of texts (a transformer) and on pairs of images (a CNN), 8 micro-batches
of 16 rows, everything jitted, on one thread. Rounds are interleaved, and ratios are of neighbouring
runs; seconds are those of the processor. Then the temporaries that XLA plans for 4 and for 64
micro-batches, with the loss in blocks, less the outputs: all that grows with the batch.

Usage: python benchmarks/rowwise_jax.py [--models transformer CNN] [--rounds 9] [--json FILE]
"""

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from command import parser_of, save
from jax import lax

import virtualbatch.jax as vb

ROWS, SIZE, WORDS, LENGTH, WIDTH, HEADS, OUT = 128, 16, 500, 32, 128, 4, 64


def kernel(random, *shape):
    return jnp.asarray(random.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)


def text_parameters(random):
    sizes = {"qkv": 3 * WIDTH, "out": WIDTH, "up": 4 * WIDTH}
    blocks = [
        {name: kernel(random, WIDTH, size) for name, size in sizes.items()}
        | {"down": kernel(random, 4 * WIDTH, WIDTH)}
        for _ in range(4)
    ]
    words = kernel(random, WORDS, WIDTH)
    return {"words": words, "blocks": blocks, "head": kernel(random, WIDTH, OUT)}


def encode_text(params, words):
    x = params["words"][words]
    for block in params["blocks"]:
        q, k, v = jnp.split(jax.nn.standardize(x) @ block["qkv"], 3, -1)
        q, k, v = (a.reshape(*x.shape[:2], HEADS, -1) for a in (q, k, v))
        x = x + jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(jax.nn.standardize(x) @ block["up"]) @ block["down"]
    return x.mean(1) @ params["head"]


def image_parameters(random):
    sizes = [(3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 32)]
    return {"kernels": [kernel(random, *s) for s in sizes], "head": kernel(random, 32, OUT)}


def encode_image(params, x):
    for weights, stride in zip(params["kernels"], (1, 2, 1), strict=True):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, weights, [stride] * 2, "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["head"]


def texts(random, rows):
    return tuple(jnp.asarray(random.integers(0, WORDS, (2, rows, LENGTH))))


def images(random, rows):
    return tuple(jnp.asarray(random.normal(size=(2, rows, 20, 20, 3)), jnp.float32))


MODELS = {
    "transformer": (text_parameters, encode_text, texts),
    "CNN": (image_parameters, encode_image, images),
}


def unit(z):
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def contrastive(z, w):
    logits = 10 * unit(z) @ unit(w).T
    return -jnp.diag(jax.nn.log_softmax(logits)).mean()


def in_blocks(z, w, size):
    """The same, with the logits of a few rows at a time."""

    def cross_entropy(w, batch):
        z, index = batch
        own = jax.nn.log_softmax(10 * z @ w.T)
        return -jnp.take_along_axis(own, index[:, None], 1)[:, 0]

    blocks = vb.rowwise(cross_entropy, microbatch_size=size)
    return blocks(unit(w), (unit(z), jnp.arange(len(z)))).mean()


def ways(encode):
    """Names -> gradients of a batch of pairs."""

    def both(params, pair):
        return tuple(encode(params, x) for x in pair)

    def by_rows(params, pair):
        z, w = both(params, pair)
        return ((unit(z) - unit(w)) ** 2).sum(1).mean()

    entries = vb.rowwise(both, microbatch_size=SIZE)
    return {
        "rowwise": jax.value_and_grad(lambda params, pair: contrastive(*entries(params, pair))),
        "uncut": jax.value_and_grad(lambda params, pair: contrastive(*both(params, pair))),
        "window": vb.value_and_grad(by_rows, microbatch_size=SIZE),
    }


def timed(name, rounds):
    """Milliseconds of each way, and the ratios of `rowwise` to the others."""
    parameters, encode, batch = MODELS[name]
    random = np.random.default_rng(0)
    given = parameters(random), batch(random, ROWS)
    programs = {way: jax.jit(run) for way, run in ways(encode).items()}
    for run in programs.values():
        jax.block_until_ready(run(*given))
    seconds = {way: [] for way in programs}
    for _ in range(rounds):
        for way, run in programs.items():
            start = time.process_time()
            jax.block_until_ready(run(*given))
            seconds[way].append(time.process_time() - start)
    result = {f"{way}, ms": 1e3 * statistics.median(found) for way, found in seconds.items()}
    for way in ("window", "uncut"):
        pairs = zip(seconds["rowwise"], seconds[way], strict=True)
        result[f"rowwise / {way}"] = statistics.median(a / b for a, b in pairs)
    return result


def temporaries(name, steps):
    """Bytes of temporaries, with the outputs and without."""
    parameters, encode, batch = MODELS[name]
    random = np.random.default_rng(0)
    rows = steps * SIZE
    entries = vb.rowwise(
        lambda params, pair: tuple(encode(params, x) for x in pair), microbatch_size=SIZE
    )
    given = parameters(random), batch(random, rows)

    def whole(params, pair):
        return in_blocks(*entries(params, pair), SIZE)

    compiled = jax.jit(jax.value_and_grad(whole)).lower(*given).compile()
    found = compiled.memory_analysis().temp_size_in_bytes
    return {"all": found, "less the outputs": found - 2 * rows * OUT * 4}


def main():
    arguments = parser_of(__doc__, models=MODELS, rounds=9).parse_args()
    result = {}
    for name in arguments.models:
        found = timed(name, arguments.rounds)
        memory = {steps: temporaries(name, steps) for steps in (4, 64)}
        result[name] = found | {"temporary bytes": memory}
        print(f"\n{name}")
        for label, value in found.items():
            print(f"{label:20} {value:10.2f}")
        for steps, bytes_of in memory.items():
            for label, value in bytes_of.items():
                print(f"temporary bytes, {steps} micro-batches, {label:16} {value:12,}")
    save(arguments.json, result)


if __name__ == "__main__":
    main()
