"""The first window of a loss proves itself, eagerly."""

import random
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_close

import virtualbatch.tensorflow as vb

pytestmark = pytest.mark.proves_itself

X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
MASK = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1], "float32")


def kernel(*shape):
    values = np.random.default_rng(1).normal(size=shape or (4, 1)).astype("float32")
    return tf.Variable(values, name="kernel")


def squares(w, b):
    return tf.reduce_mean((b @ w) ** 2)


def masked(w, b):
    return tf.reduce_sum((b["x"] @ w)[:, 0] ** 2 * b["m"]) / tf.reduce_sum(b["m"])


def tokens(b):
    return tf.reduce_sum(b["m"])


def two_terms(w, b):
    return {"masked": masked(w, b), "decay": tf.reduce_sum(w**2)}


def noisy(w, b):
    return squares(w, b + tf.random.normal(tf.shape(b)))


BATCH = {"x": X, "m": MASK}
RIGHT = {
    "squares": (squares, X, {}),
    "masked": (masked, BATCH, {"weight": tokens}),
    "terms": (two_terms, BATCH, {"weight": lambda b: {"masked": tokens(b), "decay": None}}),
    "sum": (lambda w, b: tf.reduce_sum((b @ w) ** 2), X, {"weight": "sum"}),
    "noise": (noisy, X, {}),
    "aux": (lambda w, b: (squares(w, b), b), X, {"has_aux": True}),
    "a tf.function": (tf.function(squares), X, {}),
    "an embedding": (
        lambda w, b: tf.reduce_mean(tf.nn.embedding_lookup(w, b) ** 2),
        np.arange(24).reshape(12, 2) % 4,
        {},
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_no_false_alarm(name, caplog):
    loss, batch, options = RIGHT[name]
    w = kernel()
    vb.value_and_gradients(partial(loss, w), batch, [w], microbatch_size=3, **options)
    assert not caplog.records


def coupled(w, b):
    z = tf.math.l2_normalize(b @ w, 1)
    return tf.reduce_mean(tf.linalg.matmul(z, z, transpose_b=True) ** 2)


WRONG = {
    "sum_loss": (lambda w, b: tf.reduce_sum((b @ w) ** 2), X, {}, "weights"),
    "weight": (masked, BATCH, {}, "weights"),
    "coupled_rows": (coupled, X, {}, "rowwise"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_faults_are_refused_by_name_and_nothing_is_remembered(kind):
    loss, batch, options, page = WRONG[kind]
    w = kernel(4, 2)
    run = partial(vb.value_and_gradients, partial(loss, w), batch, [w], microbatch_size=3)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"must add up .*{kind} at .*docs/guides/{page}\.md"):
            run(**options)
    run(**options, check=False)


def test_a_divisor_with_a_floor_is_refused_where_a_micro_batch_is_empty():
    w = kernel()

    def loss(b):
        return tf.reduce_sum(tf.nn.softplus(b["x"] @ w)) / tf.maximum(tf.reduce_sum(b["m"]), 1)

    batch = {"x": X[:4], "m": np.array([0, 0, 1, 1], "float32")}
    with pytest.raises(ValueError, match="weight 0 is left out"):
        vb.value_and_gradients(loss, batch, [w], microbatch_size=2, weight=tokens)


def test_a_term_without_a_gradient_is_refused():
    w = kernel()

    def loss(b):
        found = b @ w
        accuracy = tf.reduce_mean(tf.cast(found < 9, tf.float32))
        return {"ce": tf.reduce_mean(found**2), "accuracy": accuracy}

    with pytest.raises(ValueError, match="Got 'accuracy' without one"):
        vb.value_and_gradients(loss, X, [w], microbatch_size=3)


def test_batch_norm_is_told_and_trains(caplog):
    model = keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.build((None, 4))
    moving = [v.numpy() for v in model.non_trainable_variables]

    def loss(b):
        return tf.reduce_mean(model(b, training=True) ** 2)

    vb.value_and_gradients(loss, X, model.trainable_variables, microbatch_size=6)
    (record,) = caplog.records
    assert "could not be tried (batchnorm at" in record.getMessage()
    # Two micro-batches moved the statistics, as without the check; its own runs did not.
    unchecked = keras.models.clone_model(model)
    unchecked.build((None, 4))
    for a, b in zip(unchecked.non_trainable_variables, moving, strict=True):
        a.assign(b)
    for a, b in zip(unchecked.trainable_variables, model.trainable_variables, strict=True):
        a.assign(b)
    vb.value_and_gradients(
        lambda b: tf.reduce_mean(unchecked(b, training=True) ** 2),
        X,
        unchecked.trainable_variables,
        microbatch_size=6,
        check=False,
    )
    pairs = zip(model.non_trainable_variables, unchecked.non_trainable_variables, strict=True)
    for a, b in pairs:
        assert_close(a.numpy(), b.numpy())


def drawn(check):
    tf.random.set_seed(3)
    random.seed(3)
    w = kernel()
    found = [
        vb.value_and_gradients(partial(noisy, w), X, [w], microbatch_size=3, check=check)
        for _ in range(2)
    ]
    numbers = [tf.random.normal([2]).numpy(), random.random()]
    return [*(x.numpy() for loss, (gradient,) in found for x in (loss, gradient)), *numbers]


def test_random_numbers_are_those_without_it():
    for a, b in zip(drawn(True), drawn(False), strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_loss_is_tried_once():
    w, counts = kernel(), []

    def loss(b):
        counts.append(1)
        return squares(w, b["x"])

    found = []
    for batch in ({"x": X}, {"x": X}, {"x": X, "y": X}):
        counts.clear()
        vb.value_and_gradients(loss, batch, [w], microbatch_size=6)
        found.append(len(counts))
    # A trace that finds its variables, three pairs of three runs, and two micro-batches.
    assert found == [12, 2, 12]


def test_in_a_graph_nothing_is_tried(caplog):
    w = kernel()
    loss = WRONG["sum_loss"][0]
    tf.function(lambda b: vb.value_and_gradients(partial(loss, w), b, [w], microbatch_size=3))(X)
    assert not caplog.records
