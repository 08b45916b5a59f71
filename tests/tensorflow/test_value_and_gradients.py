"""The law: a cut batch has the loss and the gradients of the uncut one."""

import dataclasses
from collections import namedtuple

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from tests.oracle import assert_all_close, assert_close, tolerance
from tests.tensorflow.modes import MODES, QUICK, WITHOUT_XLA, arrays, compiled, uncut
from tests.tensorflow.problems import NAMES, problem
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

# Rows of the batch and of a micro-batch.
CUTS = {
    "even": (12, 4),
    "lone last row": (9, 4),
    "one micro-batch": (5, 8),
    "one row each": (5, 1),
}


# XLA takes seconds per program; these two hold the loop, the remainder and empty micro-batches.
ALL_CUTS = [(cut, mode) for cut in CUTS for mode in ("eager", "static", "dynamic")]
XLA_CUTS = [("lone last row", "jit"), ("one row each", "jit")]


@pytest.mark.parametrize(
    "way",
    tiered(ALL_CUTS + XLA_CUTS, [("lone last row", mode) for mode in QUICK], "further cuts"),
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_the_law(name, way):
    cut, mode = way
    rows, size = CUTS[cut]
    loss_fn, weight, make_batch, variables, _ = problem(name)
    batch = make_batch(rows)
    expected_loss, expected = uncut(loss_fn, batch, variables)

    def train(batch):
        return vb.value_and_gradients(
            loss_fn, batch, variables, microbatch_size=size, weight=weight
        )

    loss, gradients = compiled(mode, train, batch)(batch)
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)
    assert loss.dtype == tf.float64
    assert [gradient.dtype for gradient in gradients] == [tf.float64] * len(variables)


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("name", tiered(NAMES, NAMES[-1:], "further losses"))
def test_float32_is_within_its_rounding(name, mode):
    wide, narrow = problem(name), problem(name, "float32")
    expected_loss, expected = uncut(wide.loss_fn, wide.batch(11), wide.variables)
    batch = narrow.batch(11)

    def train(batch):
        return vb.value_and_gradients(
            narrow.loss_fn, batch, narrow.variables, microbatch_size=4, weight=narrow.weight
        )

    loss, gradients = compiled(mode, train, batch)(batch)
    allowed = tolerance("float32", 11 * narrow.summands)
    assert_close(loss, expected_loss, allowed)
    assert_all_close(arrays(gradients), expected, allowed)
    assert loss.dtype == gradients[0].dtype == tf.float32


@pytest.mark.parametrize("mode", WITHOUT_XLA)
@pytest.mark.parametrize("steps", tiered([1, 3, 8, 100], [3], "further cuts"))
def test_accumulation_steps(steps, mode):
    loss_fn, weight, make_batch, variables, _ = problem("tokens")
    batch = make_batch(8)
    sizes = []

    def counting_loss(batch):
        sizes.append(batch["x"].shape[0])
        return loss_fn(batch)

    def train(batch):
        return vb.value_and_gradients(
            counting_loss, batch, variables, accumulation_steps=steps, weight=weight
        )

    loss, gradients = compiled(mode, train, batch)(batch)
    expected_loss, expected = uncut(loss_fn, batch, variables)
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)
    if mode == "eager":
        # microbatch_size = ceil(8 / steps), cut evenly.
        assert sizes == {1: [8], 3: [3, 3, 2], 8: [1] * 8, 100: [1] * 8}[steps]


@pytest.mark.parametrize("mode", WITHOUT_XLA)
@pytest.mark.parametrize("size", [4, np.int64(4)])
def test_both_sizes_may_be_given_where_they_agree(size, mode):
    loss_fn, _, make_batch, variables, _ = problem("rows")
    batch = make_batch(11)

    def train(batch):
        return vb.value_and_gradients(
            loss_fn, batch, variables, microbatch_size=size, accumulation_steps=3
        )

    assert_all_close(
        arrays(compiled(mode, train, batch)(batch)[1]), uncut(loss_fn, batch, variables)[1]
    )


def test_eager_micro_batches_are_even():
    # 4, 4, 1 would hand a BatchNorm a single row.
    sizes = []

    def loss_fn(x):
        sizes.append(x.shape[0])
        return tf.reduce_sum(x)

    vb.value_and_gradients(loss_fn, tf.ones([9, 2]), [FIRST], microbatch_size=4)
    assert sizes == [3, 3, 3]


def test_rows_may_come_in_any_order():
    loss_fn, weight, make_batch, variables, _ = problem("terms")
    batch = make_batch(11)
    expected = uncut(loss_fn, batch, variables)[1]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(11)
        shuffled = {key: tf.gather(value, order) for key, value in batch.items()}
        found = vb.value_and_gradients(
            loss_fn, shuffled, variables, microbatch_size=4, weight=weight
        )
        assert_all_close(arrays(found[1]), expected)


# Batches: x and y are found by `take`, whatever holds them.

X = np.random.default_rng(1).normal(size=(10, 3))
Y = np.random.default_rng(2).normal(size=(10, 1))
FRAME = pd.DataFrame(X, columns=list("abc"), index=range(20, 30))
SERIES = pd.Series(Y[:, 0], index=range(5, 15))
Row = namedtuple("Row", "image label")


class Nested:
    """A class that TensorFlow looks into by its nest protocol."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __tf_flatten__(self):
        return (), (self.x, self.y)

    @classmethod
    def __tf_unflatten__(cls, metadata, components):
        return cls(*components)


BATCHES = {
    "tuple": ((X, Y), lambda b: b),
    "list": ([X, Y], lambda b: b),
    "dict": ({"y": Y, "x": X}, lambda b: (b["x"], b["y"])),
    "namedtuple": (Row(X, Y), lambda b: (b.image, b.label)),
    "nested": ({"in": [{"x": X}], "out": (Y,)}, lambda b: (b["in"][0]["x"], b["out"][0])),
    "own class": (Nested(X, Y), lambda b: (b.x, b.y)),
    "one array": (np.concatenate([X, Y], 1), lambda b: (b[:, :3], b[:, 3:])),
    "tensors": ((tf.constant(X), tf.constant(Y)), lambda b: b),
    "frame and series": ((FRAME, SERIES), lambda b: (b[0], tf.reshape(b[1], [-1, 1]))),
    "other leaves": (
        {"x": X, "y": Y, "none": None, "flag": True, "text": "mse", "three": 3},
        lambda b: (b["x"], b["y"] if b["flag"] and b["none"] is None else 0 * b["y"]),
    ),
}


@pytest.mark.parametrize(
    "mode", tiered(["eager", "static"], ["eager"], "a graph sees what it was given")
)
@pytest.mark.parametrize("structure", BATCHES)
def test_batches_of_any_structure(structure, mode):
    batch, take = BATCHES[structure]
    kernel = tf.Variable(np.ones((3, 1)))
    seen = []

    def loss_fn(batch):
        seen.append(type(batch))
        x, y = take(batch)
        return tf.reduce_mean((tf.tanh(tf.matmul(tf.cast(x, tf.float64), kernel)) - y) ** 2)

    def train():
        return vb.value_and_gradients(loss_fn, batch, [kernel], microbatch_size=4)

    loss, gradients = train() if mode == "eager" else tf.function(train)()
    if not isinstance(batch, np.ndarray):
        assert set(seen) == {type(batch)}
    expected_loss, expected = uncut(loss_fn, batch, [kernel])
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)


@dataclasses.dataclass
class Unseen:
    y: object


@pytest.mark.parametrize("batch", [{"x": X, "rest": Unseen(Y)}, Unseen(Y)], ids=["inside", "alone"])
def test_arrays_that_tensorflow_does_not_see_are_refused(batch):
    # They would reach every micro-batch whole.
    with pytest.raises(TypeError, match=r"where tf\.nest finds them\. Got batch.*\.y inside"):
        vb.value_and_gradients(lambda batch: 0.0, batch, [FIRST], microbatch_size=1)


def test_rows_are_compared_wherever_tensorflow_finds_them():
    with pytest.raises(ValueError, match=r"10 rows in tf\.nest\.flatten\(batch\)\[0\] and 4 rows"):
        vb.value_and_gradients(
            lambda batch: tf.reduce_mean(batch[0].x),
            (Nested(X, Y[:4]), X),
            [FIRST],
            microbatch_size=2,
        )


@pytest.mark.parametrize("mode", WITHOUT_XLA)
def test_ragged_leaves(mode):
    words = tf.ragged.constant([[1.0, 2], [3], [], [4, 5, 6], [7], [8, 9], [1]], dtype=tf.float64)
    batch = (words, tf.constant(Y[:7]))
    scale = tf.Variable(np.float64(1.5))

    def loss_fn(batch):
        return tf.reduce_mean((tf.reduce_sum(batch[0], 1) * scale - batch[1][:, 0]) ** 2)

    def train(batch):
        return vb.value_and_gradients(loss_fn, batch, [scale], microbatch_size=3)

    loss, gradients = compiled(mode, train, batch)(batch)
    expected_loss, expected = uncut(loss_fn, batch, [scale])
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)


@pytest.mark.parametrize("mode", WITHOUT_XLA)
def test_text_and_bytes_as_leaves(mode):
    texts = tf.constant([str(i) for i in range(7)])
    images = tf.constant(np.arange(7 * 2 * 2).reshape(7, 2, 2) % 255, tf.uint8)
    batch = {"text": texts, "image": images}
    scale = tf.Variable(np.float64(2))

    def loss_fn(batch):
        numbers = tf.strings.to_number(batch["text"], tf.float64)
        pixels = tf.reduce_mean(tf.cast(batch["image"], tf.float64), [1, 2])
        return tf.reduce_mean(numbers * pixels * scale)

    def train(batch):
        return vb.value_and_gradients(loss_fn, batch, [scale], microbatch_size=3)

    loss, gradients = compiled(mode, train, batch)(batch)
    expected_loss, expected = uncut(loss_fn, batch, [scale])
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)


def test_elements_of_a_dataset():
    kernel = tf.Variable(np.ones((3, 1)))

    def loss_fn(batch):
        x, y = batch
        return tf.reduce_mean((x @ kernel - y) ** 2)

    @tf.function
    def epoch(dataset):
        total = tf.zeros([3, 1], tf.float64)
        for batch in dataset:
            total += vb.value_and_gradients(loss_fn, batch, [kernel], microbatch_size=3)[1][0]
        return total

    # The last batch is short, so the function sees open rows.
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    expected = sum(uncut(loss_fn, batch, [kernel])[1][0] for batch in dataset)
    assert_close(epoch(dataset), expected)


# Variables

FIRST, SECOND = tf.Variable(np.float64(2)), tf.Variable(np.ones(3))
UNUSED, WHOLE = tf.Variable(np.ones(2)), tf.Variable(3)
VARIABLES = {
    "one": SECOND,
    "list": [FIRST, SECOND],
    "tuple": (SECOND, FIRST),
    "dict": {"z": FIRST, "a": SECOND},
    "nested": {"layers": [{"kernel": SECOND}, (FIRST,)]},
    "unused": [UNUSED, FIRST],
    "integer": [WHOLE, FIRST],
    "twice": [FIRST, FIRST],
}


@pytest.mark.parametrize(
    "mode", tiered(["eager", "static", "jit"], ["static"], "structures are packed the same way")
)
@pytest.mark.parametrize("structure", VARIABLES)
def test_gradients_have_the_structure_of_the_variables(structure, mode):
    variables = VARIABLES[structure]

    def loss_fn(x):
        # The first variable enters twice, as a tied weight does.
        return FIRST * tf.reduce_mean(tf.linalg.matvec(x, SECOND)) + FIRST**2

    def train(x):
        return vb.value_and_gradients(loss_fn, x, variables, microbatch_size=4)

    _, gradients = compiled(mode, train, X)(tf.constant(X))
    tf.nest.assert_same_structure(gradients, variables)
    assert_all_close(arrays(gradients), uncut(loss_fn, X, variables)[1])


def test_a_loss_that_depends_on_nothing_has_no_gradient():
    loss, gradients = vb.value_and_gradients(
        lambda x: tf.constant(3.0, tf.float64), X, [FIRST], microbatch_size=4
    )
    assert_close(loss, 3.0)
    assert gradients == [None]


def test_a_variable_used_by_some_micro_batches_only():
    # Peer case R2: the branch is taken by the first micro-batch alone.
    def loss_fn(x):
        return tf.reduce_mean(x * FIRST) if x[0, 0] > 0 else tf.reduce_mean(x * 0 + 1.0)

    x = np.array([[1.0], [1.0], [-1.0], [-1.0]])
    loss, (gradient,) = vb.value_and_gradients(loss_fn, x, [FIRST], microbatch_size=2)
    assert_close(loss, 1.5)
    assert_close(gradient, 0.5)


@pytest.mark.parametrize("mode", tiered(MODES, ["static"], "a recurrence takes seconds to compile"))
def test_a_keras_model_with_a_recurrence(mode):
    model = keras.Sequential(
        [keras.layers.LSTM(3, dtype="float64"), keras.layers.Dense(1, dtype="float64")]
    )
    model.build((None, 4, 2))
    random = np.random.default_rng(3)
    batch = (tf.constant(random.normal(size=(7, 4, 2))), tf.constant(random.normal(size=(7, 1))))
    variables = {variable.path: variable for variable in model.trainable_variables}

    def loss_fn(batch):
        x, y = batch
        return tf.reduce_mean((model(x, training=True) - y) ** 2)

    def train(batch):
        return vb.value_and_gradients(loss_fn, batch, variables, microbatch_size=3)

    loss, gradients = compiled(mode, train, batch)(batch)
    expected_loss, expected = uncut(loss_fn, batch, variables)
    assert list(gradients) == list(variables)
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)


def test_a_loop_and_weighted_terms_in_one_graph():
    # The backward pass of the loop is built inside a branch, the hardest place for it.
    kernel = tf.Variable(np.random.default_rng(4).normal(size=(3, 3)))

    def loss_fn(x):
        _, last = tf.while_loop(
            lambda i, x: i < 4, lambda i, x: (i + 1, tf.tanh(x @ kernel)), (0, x)
        )
        return {"mean": tf.reduce_mean(last), "square": tf.reduce_mean(last**2)}

    def weight(x):
        return {"mean": tf.shape(x)[0], "square": 3.0 * tf.cast(tf.shape(x)[0], tf.float32)}

    @tf.function
    def train(x):
        return vb.value_and_gradients(loss_fn, x, [kernel], microbatch_size=4, weight=weight)

    loss, gradients = train(tf.constant(X))
    expected_loss, expected = uncut(loss_fn, tf.constant(X), [kernel])
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)


def test_complex_variables():
    amplitude = tf.Variable(np.array([1 + 2j, 3 - 1j, 0.5j]))

    def loss_fn(x):
        return tf.reduce_mean(tf.abs(tf.linalg.matvec(tf.cast(x, tf.complex128), amplitude)) ** 2)

    _, (gradient,) = vb.value_and_gradients(loss_fn, X, [amplitude], microbatch_size=3)
    with tf.GradientTape() as tape:
        loss = loss_fn(X)
    expected = tape.gradient(loss, amplitude).numpy()
    assert_close(gradient.numpy().real, expected.real)
    assert_close(gradient.numpy().imag, expected.imag)


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_dropout_draws_fresh_masks(mode):
    dropout = keras.layers.Dropout(0.5, seed=3)
    scale = tf.Variable(1.0)

    def loss_fn(x):
        kept = dropout(x * scale, training=True)
        return tf.reduce_mean(kept), kept

    def train(x):
        return vb.value_and_gradients(loss_fn, x, [scale], microbatch_size=1, has_aux=True)

    run = compiled(mode, train, None) if mode == "eager" else tf.function(train)
    x = tf.ones([6, 32])
    masks = np.concatenate([run(x)[0][1].numpy() for _ in range(2)])
    assert len(np.unique(masks, axis=0)) == 12


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_the_result_can_be_differentiated_again(mode):
    kernel = tf.Variable(np.ones((3, 1)))

    def loss_fn(x):
        return tf.reduce_mean(tf.tanh(x @ kernel) ** 2)

    def train(x):
        return vb.value_and_gradients(loss_fn, x, [kernel], microbatch_size=4)

    x = tf.constant(X)
    with tf.GradientTape(persistent=True) as tape:
        loss, (gradient,) = compiled(mode, train, x)(x)
        size = tf.reduce_sum(gradient**2)
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            whole = loss_fn(x)
        whole_size = tf.reduce_sum(inner.gradient(whole, kernel) ** 2)
    assert_close(tape.gradient(loss, kernel), gradient)
    assert_close(tape.gradient(size, kernel), outer.gradient(whole_size, kernel))


def test_shares_are_formed_in_float64():
    # Thirds and sevenths formed in float32 would be off by 6e-8.
    scale = tf.Variable(np.float64(1))

    def loss_fn(x):
        return tf.reduce_mean(x) * scale

    @tf.function
    def train(x):
        return vb.value_and_gradients(loss_fn, x, [scale], microbatch_size=3)

    x = tf.ones([7, 1], tf.float64)
    for loss, (gradient,) in (
        train(x),
        vb.value_and_gradients(loss_fn, x, [scale], microbatch_size=3),
    ):
        assert_close([loss, gradient], [1.0, 1.0], 1e-15)


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_each_replica_accumulates_its_own_rows(mode):
    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
    with strategy.scope():
        kernel = tf.Variable(np.ones((3, 1)))

    def loss_fn(x):
        return tf.reduce_mean(tf.tanh(x @ kernel) ** 2)

    def replica(x):
        return vb.value_and_gradients(loss_fn, x, [kernel], microbatch_size=4)[1][0]

    def train(x):
        return strategy.run(replica, args=(x,))

    x = tf.constant(X)
    assert_close(compiled(mode, train, x)(x), uncut(loss_fn, x, [kernel])[1][0])
