"""Ways to the gradient of one ragged batch that `ragged.py` compares, in each engine."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ragged_model import (
    CLASSES,
    HEADS,
    LAYERS,
    LENGTH,
    MICROBATCH_SIZE,
    ROWS,
    TOKENS,
    WIDTH,
    WORDS,
    data,
    token_loss,
    weights,
)

from virtualbatch import Window, pack

# Lengths of compiled engines: multiples of one of these, so at most four or eight shapes.
COARSE, FINE = 64, 32
PADDED, TRIMMED, PACKED = "padded", "trimmed, not sorted", "packed"
ROUNDED, ROUNDED_FINE = (f"packed, round_to={n}" for n in (COARSE, FINE))

Contenders = dict[str, Callable[[], list[np.ndarray]]]


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
        einsum, silu, rsqrt = torch.einsum, functional.silu, torch.rsqrt
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
        ROUNDED: lambda: gradients(pack(batch, lengths, microbatch_tokens=TOKENS, round_to=COARSE)),
    }


def on_tensorflow(threads: int) -> Contenders:
    import tensorflow as tf

    import virtualbatch.tensorflow as vb

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    class Functions:
        einsum, silu, rsqrt = tf.einsum, tf.nn.silu, tf.math.rsqrt
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
        ROUNDED: lambda: gradients(pack(batch, lengths, microbatch_tokens=TOKENS, round_to=COARSE)),
    }


def on_jax(threads: int) -> Contenders:
    import jax
    import jax.numpy as jnp

    import virtualbatch.jax as vb

    class Functions:
        einsum, silu, rsqrt = jnp.einsum, jax.nn.silu, jax.lax.rsqrt
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

    def packed(round_to: int) -> list[np.ndarray]:
        given = pack(batch, lengths, microbatch_tokens=TOKENS, round_to=round_to)
        return listed(window(w, given))

    return {
        PADDED: lambda: listed(whole(w, batch)),
        TRIMMED: lambda: listed(window(w, trimmed(batch, lengths, COARSE))),
        ROUNDED: lambda: packed(COARSE),
        ROUNDED_FINE: lambda: packed(FINE),
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
            y = layers.Dense(4 * WIDTH, activation="silu")(layers.LayerNormalization()(x))
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


ENGINES = {"torch": on_torch, "tensorflow": on_tensorflow, "jax": on_jax, "keras": on_keras}
