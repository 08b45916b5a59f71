"""Programs to plan, one for each engine, as a user would write them for `virtualbatch plan`."""

import numpy as np

WIDTH = 32


def rows(batch_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch_size, WIDTH)).astype("float32")
    return x, x.sum(1, keepdims=True)


def keras_program(batch_size):
    import keras

    model = keras.Sequential(
        [
            keras.Input((WIDTH,)),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer="adam", loss="mse")
    return {"model": model, "batch": rows(batch_size)}


def torch_program(batch_size):
    import torch

    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1)
    )

    def loss_fn(batch):
        x, y = batch
        return torch.nn.functional.mse_loss(model(x), y)

    batch = [torch.as_tensor(array) for array in rows(batch_size)]
    return {"loss_fn": loss_fn, "batch": batch, "module": model}


def tensorflow_program(batch_size):
    import tensorflow as tf

    first = tf.Variable(tf.random.normal([WIDTH, 256], seed=0) / 6)
    last = tf.Variable(tf.random.normal([256, 1], seed=1) / 16)

    def loss_fn(batch):
        x, y = batch
        return tf.reduce_mean((tf.nn.relu(x @ first) @ last - y) ** 2)

    batch = tuple(tf.constant(array) for array in rows(batch_size))
    return {"loss_fn": loss_fn, "batch": batch, "variables": [first, last]}


def jax_program(batch_size):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": jax.random.normal(keys[0], (WIDTH, 256)) / 6,
        "last": jax.random.normal(keys[1], (256, 1)) / 16,
    }

    def loss(params, batch):
        x, y = batch
        return jnp.mean((jax.nn.relu(x @ params["first"]) @ params["last"] - y) ** 2)

    return {"fun": loss, "args": (params, rows(batch_size))}


def of_another_size(batch_size):
    return jax_program(2 * batch_size)


def that_raises(batch_size):
    raise RuntimeError("no\n  data here")


def that_exits(batch_size):
    raise SystemExit("no data here")


def of_nothing(batch_size):
    return None


def of_other_names(batch_size):
    return {"model": None, "data": None}


not_a_function = 3


def sum_program(batch_size):
    found = jax_program(batch_size)
    mean = found["fun"]
    return found | {"fun": lambda params, batch: mean(params, batch) * len(batch[0])}


def failing_program(batch_size):
    def fun(params, batch):
        raise KeyError("no such column")

    return jax_program(batch_size) | {"fun": fun}
