"""Windows with statistics and without, for each engine; `noise.py` times them.

8 micro-batches of 32 rows. Dense layers: narrow ones, where the time is mostly overhead, and wide
ones, which use each weight once a row. And convolutions, which use each weight 256 times a row.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

ENGINES = [
    "torch",
    "jax",
    "tensorflow",
    "keras on tensorflow",
    "keras on jax",
    "keras on torch",
]
MICROBATCH_SIZE, ROWS, SIDE, CLASSES = 32, 256, 16, 10
# Model -> units of the hidden layers, or channels.
MODELS = {"narrow": 128, "wide": 1024, "CNN": 32}
_rng = np.random.default_rng(0)
FLAT = _rng.normal(size=(ROWS, 64)).astype("float32")
IMAGES = _rng.normal(size=(ROWS, SIDE, SIDE, 1)).astype("float32")
Y = _rng.integers(0, CLASSES, ROWS)

Pair = tuple[Callable[[], None], Callable[[], None]]


def windows_of(engine: str) -> dict[str, Pair]:
    """For each model (without, with statistics), each run once already."""
    make = {"torch": on_torch, "jax": on_jax, "tensorflow": on_tensorflow}.get(engine, on_keras)
    found = {}
    for name in MODELS:
        pair = make(name)
        for run in pair:
            run()
        found[name] = pair
    return found


def weights(name: str) -> list[Any]:
    """Kernels of the three layers of a model."""
    width = MODELS[name]
    if name == "CNN":
        flat = SIDE * SIDE * width
        shapes = [(3, 3, 1, width), (3, 3, width, width), (flat, CLASSES)]
    else:
        shapes = list(pairwise([64, width, width, CLASSES]))
    rng = np.random.default_rng(1)
    return [
        (rng.normal(size=shape) / np.prod(shape[:-1]) ** 0.5).astype("float32") for shape in shapes
    ]


def inputs(name: str) -> Any:
    return IMAGES if name == "CNN" else FLAT


def on_torch(name: str) -> Pair:
    import torch
    from torch import nn

    import virtualbatch.torch as vb

    torch.manual_seed(0)
    width = MODELS[name]
    if name == "CNN":
        layers = [
            *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Flatten()),
            nn.Linear(SIDE * SIDE * width, CLASSES),
        ]
    else:
        layers = [
            *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, CLASSES),
        ]
    model = nn.Sequential(*layers)
    x = torch.as_tensor(inputs(name))
    batch = (x.movedim(-1, 1) if name == "CNN" else x), torch.as_tensor(Y)

    def window(stats: bool) -> None:
        model.zero_grad()
        vb.backward(
            lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
            batch,
            module=model,
            microbatch_size=MICROBATCH_SIZE,
            stats=stats,
        )

    return partial(window, False), partial(window, True)


def on_jax(name: str) -> Pair:
    import jax
    import jax.numpy as jnp

    import virtualbatch.jax as vb

    def layer(x: Any, kernel: Any) -> Any:
        if kernel.ndim == 2:
            return x.reshape(len(x), -1) @ kernel
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        for kernel in params[:-1]:
            x = jax.nn.relu(layer(x, kernel))
        found = jax.nn.log_softmax(layer(x, params[-1]))
        return -jnp.take_along_axis(found, y[:, None], 1).mean()

    params = [jnp.asarray(kernel) for kernel in weights(name)]
    batch = jnp.asarray(inputs(name)), jnp.asarray(Y)

    def window(stats: bool) -> Callable[[], None]:
        run = jax.jit(vb.value_and_grad(loss, microbatch_size=MICROBATCH_SIZE, stats=stats))
        return lambda: jax.block_until_ready(run(params, batch)) and None

    return window(False), window(True)


def on_tensorflow(name: str) -> Pair:
    import tensorflow as tf

    import virtualbatch.tensorflow as vb

    kernels = [tf.Variable(kernel) for kernel in weights(name)]

    def layer(x: Any, kernel: Any) -> Any:
        if len(kernel.shape) == 2:
            return tf.reshape(x, (-1, kernel.shape[0])) @ kernel
        return tf.nn.conv2d(x, kernel, 1, "SAME")

    def loss(batch: Any) -> Any:
        x, y = batch
        for kernel in kernels[:-1]:
            x = tf.nn.relu(layer(x, kernel))
        found = tf.nn.sparse_softmax_cross_entropy_with_logits(y, layer(x, kernels[-1]))
        return tf.reduce_mean(found)

    batch = tf.constant(inputs(name)), tf.constant(Y)

    def window(stats: bool) -> Callable[[], None]:
        @tf.function
        def run(x: Any, y: Any) -> Any:
            return vb.value_and_gradients(
                loss, (x, y), kernels, microbatch_size=MICROBATCH_SIZE, stats=stats
            )

        return lambda: run(*batch)[0].numpy() and None

    return window(False), window(True)


def on_keras(name: str) -> Pair:
    import keras
    from keras import layers

    import virtualbatch.keras as vb

    width = MODELS[name]
    x = inputs(name)
    kind = (
        partial(layers.Conv2D, width, 3, padding="same")
        if name == "CNN"
        else partial(layers.Dense, width)
    )

    def window(callbacks: list[Any]) -> Callable[[], None]:
        model = keras.Sequential(
            [
                keras.Input(x.shape[1:]),
                kind(activation="relu"),
                kind(activation="relu"),
                layers.Flatten(),
                layers.Dense(CLASSES),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # XLA on CPU is the slower choice for TensorFlow.
        model.compile("sgd", loss, jit_compile=keras.backend.backend() == "jax")
        vb.accumulate(model, microbatch_size=MICROBATCH_SIZE)
        for callback in callbacks:
            callback.set_model(model)
            callback.on_train_begin()
        return lambda: float(model.train_on_batch(x, Y)) and None

    return window([]), window([vb.NoiseScale()])
