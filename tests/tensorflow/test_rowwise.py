"""`rowwise` against the uncut function, or against the same micro-batches in one graph."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import EXACT, assert_close
from tests.tensorflow.modes import MODES, arrays, compiled
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

ROWS, SIZE = 7, 3
GRAPHS = "graphs of every loss run in the conformance tests"
EAGER = tiered(MODES, ["eager"], GRAPHS)
WITHOUT_XLA = tiered(MODES[:3], ["eager"], GRAPHS)
# From where gradients are asked.
ASKED = ["eager inside", "static inside", "static outside"]
# Micro-batches as each mode cuts them.
CUTS = {"eager": (3, 2, 2), "static": (3, 3, 1), "dynamic": (3, 3, 1), "jit": (3, 3, 1)}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def batch():
    return {"x": tf.constant(numbers(ROWS, 4)), "u": tf.constant(numbers(ROWS, 4, seed=1))}


def variable(*shape, seed=2, dtype="float64", **options):
    return tf.Variable(numbers(*shape, seed=seed), dtype=dtype, **options)


def coupled(z):
    """A loss in which every row meets every other."""
    logits = z @ tf.transpose(z)
    return tf.reduce_mean(tf.reduce_logsumexp(logits, 1) - tf.linalg.diag_part(logits))


def gradient_of(encode, sources, loss=coupled):
    def call(batch):
        with tf.GradientTape() as tape:
            value = loss(encode(batch))
        return value, tape.gradient(value, sources)

    return call


def in_one_graph(fn, sizes):
    """The same micro-batches, all recorded."""

    def encode(batch):
        stops = np.cumsum(sizes)
        pieces = [
            fn(tf.nest.map_structure(lambda x, a=a, b=b: x[a:b], batch))
            for a, b in zip(stops - sizes, stops, strict=True)
        ]
        return tf.concat(pieces, 0)

    return encode


def assert_equal_gradients(found, due):
    assert_close(found[0], due[0], EXACT)
    pairs = list(zip(arrays(found[1]), arrays(due[1]), strict=True))
    assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
    # Against the largest of all: where a gradient is 0, what is found is rounding.
    flat = [np.concatenate([np.ravel(x[k]) for x in pairs if x[k] is not None]) for k in (0, 1)]
    assert_close(*flat, EXACT)


class Encoder:
    """Keras layers that change state as they run."""

    def __init__(self, *layers):
        self.model = keras.Sequential([keras.layers.Dense(5, dtype="float64"), *layers])
        self.model(tf.zeros([2, 4], tf.float64))
        self.start = [x.numpy() for x in self.model.variables]

    def __call__(self, batch):
        return self.model(batch["x"], training=True)

    @property
    def variables(self):
        return [x.value for x in self.model.trainable_variables]

    def state(self):
        """What the state became, which is reset."""
        found = [x.numpy() for x in self.model.non_trainable_variables]
        for x, value in zip(self.model.variables, self.start, strict=True):
            x.assign(value)
        return found


@pytest.mark.parametrize("mode", EAGER)
@pytest.mark.parametrize("layer", ["dropout", "batch normalisation"])
def test_state_is_replayed_and_afterwards_as_after_one_pass(mode, layer):
    layers = {
        "dropout": lambda: keras.layers.Dropout(0.3, dtype="float64"),
        "batch normalisation": lambda: keras.layers.BatchNormalization(dtype="float64"),
    }
    encoder = Encoder(layers[layer]())
    due = gradient_of(in_one_graph(encoder, CUTS[mode]), encoder.variables)
    # XLA draws other numbers than TensorFlow does from the same seed.
    due = (compiled(mode, due, batch()) if mode == "jit" else due)(batch())
    state = encoder.state()
    found = compiled(
        mode, gradient_of(vb.rowwise(encoder, microbatch_size=SIZE), encoder.variables), batch()
    )(batch())
    assert_equal_gradients(found, due)
    for a, b in zip(encoder.state(), state, strict=True):
        assert_close(a, b, EXACT)


@pytest.mark.parametrize("mode", WITHOUT_XLA)
def test_a_generator_is_replayed(mode):
    generator = tf.random.Generator.from_seed(1)
    kernel = variable(4, 3)

    def fn(batch):
        return (batch["x"] + generator.normal(tf.shape(batch["x"]), dtype=tf.float64)) @ kernel

    def loss(z):
        # The second pass leaves what was drawn between the passes.
        return coupled(z) * (2 + generator.normal([], dtype=tf.float64))

    due = gradient_of(in_one_graph(fn, CUTS[mode]), [kernel], loss)(batch())
    state = generator.state.numpy()
    generator.reset_from_seed(1)
    encode = vb.rowwise(fn, microbatch_size=SIZE)
    found = compiled(mode, gradient_of(encode, [kernel], loss), batch())(batch())
    assert_equal_gradients(found, due)
    assert (generator.state.numpy() == state).all()


def test_numbers_of_numpy_are_replayed():
    kernel = variable(4, 3)

    def fn(batch):
        return (batch["x"] * np.random.normal(size=batch["x"].shape)) @ kernel

    np.random.seed(0)
    due = gradient_of(in_one_graph(fn, CUTS["eager"]), [kernel])(batch())
    drawn = np.random.normal()
    np.random.seed(0)
    found = gradient_of(vb.rowwise(fn, microbatch_size=SIZE), [kernel])(batch())
    assert_equal_gradients(found, due)
    assert np.random.normal() == drawn


@pytest.mark.parametrize("mode", EAGER)
def test_sparse_gradients(mode):
    table = variable(9, 3)
    rows = {"i": tf.constant([0, 2, 2, 8, 1, 0, 5])}

    def fn(batch):
        return tf.tanh(tf.gather(table, batch["i"]))

    found = compiled(mode, gradient_of(vb.rowwise(fn, microbatch_size=SIZE), [table]), rows)(rows)
    assert mode == "jit" or isinstance(found[1][0], tf.IndexedSlices)
    assert_equal_gradients(found, gradient_of(fn, [table])(rows))


@pytest.mark.parametrize("mode", EAGER)
def test_rows_and_shared_arguments_take_a_gradient(mode):
    kernel, other = variable(4, 3), variable(3, 3, seed=4)

    def both(first, second):
        def encode(batch):
            hidden = first(batch)
            return second({"h": hidden, "n": tf.range(tf.shape(hidden)[0])}, tf.exp(other), 2.0)

        return encode

    def fn(batch):
        return tf.tanh(batch["x"] @ kernel)

    def again(batch, matrix, factor):
        return tf.tanh(batch["h"] @ matrix) * factor

    encode = both(vb.rowwise(fn, microbatch_size=2), vb.rowwise(again, microbatch_size=3))
    found = compiled(mode, gradient_of(encode, [kernel, other]), batch())(batch())
    assert_equal_gradients(found, gradient_of(both(fn, again), [kernel, other])(batch()))


def ragged_of(values):
    return tf.RaggedTensor.from_row_lengths(values, [1, 2, 3, 1, 2, 1, 2])


@pytest.mark.parametrize("asked", tiered(ASKED, ASKED[:1], "graphs of many inputs"))
def test_all_that_goes_in_takes_a_gradient(asked):
    """Rows, ragged rows, a variable as rows, shared ragged tensors, and frozen variables."""
    outer, tape = asked.split()
    kernel, column = variable(4, 3), variable(ROWS, 3, seed=7)
    frozen = variable(3, seed=8, trainable=False)
    x, inner = batch()["x"], tf.constant(numbers(12, 4, seed=3))

    def fn(rows, shared):
        seen = rows["x"] + tf.reduce_sum(rows["ragged"], 1)
        return tf.tanh(seen @ kernel) * rows["column"] * frozen + tf.reduce_sum(shared)

    def run(encode, outer, tape):
        def forward(x, inner):
            ragged = ragged_of(inner)
            return coupled(encode({"x": x, "ragged": ragged, "column": column}, ragged * 2.0))

        def call(forward):
            def run(x, inner):
                with tf.GradientTape() as tape:
                    tape.watch([x, inner, *([frozen] if watched else [])])
                    loss = forward(x, inner)
                sources = [kernel, column, x, inner, *([frozen] if watched else [])]
                return loss, tape.gradient(loss, sources)

            return run

        # A graph does not hear of a tape outside that watches a frozen variable.
        watched = tape == "inside"
        if outer == "eager":
            return call(forward)(x, inner)
        return (tf.function(call(forward)) if tape == "inside" else call(tf.function(forward)))(
            x, inner
        )

    found = run(vb.rowwise(fn, microbatch_size=SIZE), outer, tape)
    assert_equal_gradients(found, run(fn, "eager", tape))


@pytest.mark.parametrize("asked", tiered(ASKED, ASKED[::2], "what lies between"))
def test_rows_of_a_window_take_a_gradient(asked):
    """Also where its micro-batches have other widths."""
    outer, tape = asked.split()
    kernel = variable(4, 3)
    x = batch()["x"]

    def fn(rows):
        return tf.tanh(rows["x"] @ kernel) * tf.reduce_sum(rows["wide"], 1, keepdims=True)

    def window(x):
        cut = [x[:3], x[3:5], x[5:]]
        return [
            {"x": part, "wide": part[:, :1] * tf.ones([1, 2 + k], tf.float64)}
            for k, part in enumerate(cut)
        ]

    def gradient(forward):
        def call(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = forward(x)
            return loss, tape.gradient(loss, [x, kernel])

        return call

    def forward(x):
        return coupled(vb.rowwise(fn)(vb.Window(window(x))))

    if outer == "eager":
        found = gradient(forward)(x)
    elif tape == "inside":
        found = tf.function(gradient(forward))(x)
    else:
        found = gradient(tf.function(forward))(x)
    due = gradient(lambda x: coupled(tf.concat([fn(part) for part in window(x)], 0)))(x)
    assert_equal_gradients(found, due)


@pytest.mark.parametrize("mode", tiered(MODES[:3], ["static"], "the graph is the hard case"))
def test_a_tape_outside_of_a_graph(mode):
    kernel, temperature = variable(4, 3), variable(seed=9)
    generator = tf.random.Generator.from_seed(1)

    def fn(batch, temperature):
        noise = generator.normal(tf.shape(batch["x"]), dtype=tf.float64)
        return tf.tanh((batch["x"] + noise) @ kernel) * temperature

    def of_all(encode):
        def call(batch):
            with tf.GradientTape() as tape:
                tape.watch(batch["x"])
                value = coupled(encode(batch))
            return value, tape.gradient(value, [kernel, temperature, batch["x"]])

        return call

    encode = vb.rowwise(fn, microbatch_size=SIZE)
    inside = compiled(mode, lambda batch: encode(batch, temperature), batch())
    due = of_all(in_one_graph(lambda batch: fn(batch, temperature), CUTS[mode]))(batch())
    state = generator.state.numpy()
    generator.reset_from_seed(1)
    assert_equal_gradients(of_all(inside)(batch()), due)
    assert (generator.state.numpy() == state).all()


@pytest.mark.parametrize("mode", EAGER)
def test_outputs_of_every_kind(mode):
    kernel = variable(4, 3)

    def fn(batch):
        z = batch["x"] @ kernel
        return {
            "z": (z, tf.argmax(z, 1)),
            "positive": z[:, 0] > 0,
            "nothing": None,
            "unused": tf.tanh(z),
            "u": batch["u"],
        }

    def loss(out):
        assert out["nothing"] is None
        inside = tf.cast(out["positive"], tf.float64) + tf.cast(out["z"][1], tf.float64)
        return coupled(out["z"][0] * inside[:, None] + tf.reduce_sum(out["u"]))

    found = compiled(
        mode, gradient_of(vb.rowwise(fn, microbatch_size=SIZE), [kernel], loss), batch()
    )(batch())
    assert_equal_gradients(found, gradient_of(fn, [kernel], loss)(batch()))


@pytest.mark.parametrize(
    "mode", tiered(MODES[:3], ["eager"], "the gradient of a gradient of loops takes seconds")
)
def test_a_persistent_tape_and_a_second_derivative(mode):
    kernel = variable(4, 3)

    def fn(batch):
        return tf.tanh(batch["x"] @ kernel)

    def twice(encode):
        def call(batch):
            with tf.GradientTape(persistent=True) as outer:
                with tf.GradientTape(persistent=True) as tape:
                    z = encode(batch)
                    losses = coupled(z), tf.reduce_sum(tf.math.reduce_std(z, 0))
                first = [tape.gradient(loss, kernel) for loss in losses]
                norm = tf.reduce_sum(first[0] ** 2)
            return losses[0], [*first, outer.gradient(norm, kernel)]

        return call

    found = compiled(mode, twice(vb.rowwise(fn, microbatch_size=SIZE)), batch())(batch())
    assert_equal_gradients(found, twice(fn)(batch()))


@pytest.mark.parametrize("mode", WITHOUT_XLA)
def test_half_precision_is_summed_in_single(mode):
    scale = tf.Variable(tf.zeros([], tf.bfloat16))
    # In bfloat16 256 + 1 is 256.
    rows = tf.constant([[256.0], [1], [1], [1], [1]], tf.bfloat16)

    def call(batch):
        with tf.GradientTape() as tape:
            out = vb.rowwise(lambda batch: batch * scale, microbatch_size=1)(batch)
            value = tf.reduce_sum(tf.cast(out, tf.float32))
        return tape.gradient(value, scale)

    assert float(compiled(mode, call, rows)(rows)) == 260


@pytest.mark.parametrize("mode", EAGER)
def test_two_encoders_and_the_loss_in_blocks(mode):
    first, second, scale = variable(4, 3), variable(4, 3, seed=5), variable(seed=6)

    def block(part, others):
        logits = tf.exp(scale) * part["z"] @ tf.transpose(others)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(part["row"], logits)

    def wrapped(size, fn):
        return fn if size is None else vb.rowwise(fn, microbatch_size=size)

    def loss_of(*sizes):
        left = wrapped(sizes[0], lambda x: tf.tanh(x @ first))
        right = wrapped(sizes[1], lambda x: tf.tanh(x @ second))
        blocks = wrapped(sizes[2], block)

        def call(batch):
            with tf.GradientTape() as tape:
                z, w = left(batch["x"]), right(batch["u"])
                rows = tf.range(tf.shape(z)[0])
                both = blocks({"z": z, "row": rows}, w) + blocks({"z": w, "row": rows}, z)
                loss = tf.reduce_mean(both)
            return loss, tape.gradient(loss, [first, second, scale])

        return call

    found = compiled(mode, loss_of(2, 3, 2), batch())(batch())
    assert_equal_gradients(found, loss_of(None, None, None)(batch()))
