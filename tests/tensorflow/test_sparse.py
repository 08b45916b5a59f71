"""Gradients of embeddings: IndexedSlices with the right sums."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_all_close, assert_close
from tests.tensorflow.modes import TIERED, arrays, compiled, uncut
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

# Ids that repeat within a row, within a micro-batch and between micro-batches; 6 is unused.
IDS = tf.constant([[0, 0, 1], [2, 1, 5], [0, 5, 5], [3, 4, 0], [1, 1, 1], [2, 0, 4], [5, 3, 3]])


def new_table():
    return tf.Variable(np.random.default_rng(0).normal(size=(7, 2)))


def lookup(table, ids):
    return tf.nn.embedding_lookup(table, ids)


def one_lookup(table, ids):
    return tf.reduce_mean(lookup(table, ids) ** 2)


def two_lookups(table, ids):
    return one_lookup(table, ids) + tf.reduce_mean(tf.sin(lookup(table, ids[:, :1])))


def lookup_and_dense(table, ids):
    return one_lookup(table, ids) + 0.1 * tf.reduce_sum(table**2)


@pytest.mark.parametrize("mode", TIERED)
@pytest.mark.parametrize("size", tiered([1, 3, 20], [3], "further cuts"))
@pytest.mark.parametrize("use", [one_lookup, two_lookups, lookup_and_dense])
def test_any_use_of_a_table(use, size, mode):
    table = new_table()

    def loss_fn(ids):
        return use(table, ids)

    def train(ids):
        return vb.value_and_gradients(loss_fn, ids, [table], microbatch_size=size)

    _, gradients = compiled(mode, train, IDS)(IDS)
    with tf.GradientTape() as tape:
        loss = loss_fn(IDS)
    plain = tape.gradient(loss, table)
    assert isinstance(gradients[0], tf.IndexedSlices) == isinstance(plain, tf.IndexedSlices)
    assert_all_close(arrays(gradients), [tf.convert_to_tensor(plain)])


@pytest.mark.parametrize("mode", TIERED)
@pytest.mark.parametrize("dtype", tiered(["int32", "int64"], ["int64"], "further ids"))
def test_slices_come_in_row_order_as_the_tape_gives_them(dtype, mode):
    table, ids = new_table(), tf.cast(IDS, dtype)

    def train(ids):
        return vb.value_and_gradients(
            lambda ids: one_lookup(table, ids), ids, [table], microbatch_size=3
        )

    _, (found,) = compiled(mode, train, ids)(ids)
    with tf.GradientTape() as tape:
        loss = one_lookup(table, ids)
    plain = tape.gradient(loss, table)
    assert isinstance(found, tf.IndexedSlices)
    assert found.indices.dtype == plain.indices.dtype
    assert found.indices.numpy().tolist() == plain.indices.numpy().tolist()
    assert_close(found.values, plain.values)
    assert found.dense_shape.numpy().tolist() == [7, 2]


@pytest.mark.parametrize("mode", TIERED)
@pytest.mark.parametrize(
    "second",
    [
        lambda table, ids: tf.reduce_sum(table**2),
        lambda table, ids: tf.reduce_mean(lookup(table, ids[:, 1:]) ** 3),
    ],
    ids=["dense", "sparse"],
)
def test_terms_that_share_a_table(second, mode):
    table = new_table()

    def loss_fn(ids):
        return {"a": one_lookup(table, ids), "b": second(table, ids)}

    def weight(ids):
        return {"a": tf.shape(ids)[0], "b": tf.shape(ids)[0]}

    def train(ids):
        return vb.value_and_gradients(loss_fn, ids, [table], microbatch_size=3, weight=weight)

    _, gradients = compiled(mode, train, IDS)(IDS)
    assert_all_close(arrays(gradients), uncut(loss_fn, IDS, [table])[1])


def test_a_table_used_in_another_way_by_each_micro_batch():
    table = new_table()

    def loss_fn(batch):
        return one_lookup(table, batch) if batch.shape[0] > 3 else tf.reduce_mean(table**2)

    window = vb.Window([IDS[:4], IDS[4:]])
    _, gradients = vb.value_and_gradients(loss_fn, window, [table])
    (sparse,), (dense,) = (uncut(loss_fn, part, [table])[1] for part in window)
    assert_all_close(arrays(gradients), [4 / 7 * sparse + 3 / 7 * dense])


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_an_optimizer_takes_the_same_step(mode):
    def trained(gradients_of):
        keras.utils.set_random_seed(1)
        layer = keras.layers.Embedding(7, 2, dtype="float64")
        head = keras.layers.Dense(1, dtype="float64")
        layer.build((None, 3))
        head.build((None, 2))
        variables = layer.trainable_variables + head.trainable_variables
        optimizer = keras.optimizers.Adam(0.1)

        def loss_fn(ids):
            return tf.reduce_mean(head(tf.reduce_mean(layer(ids), 1)) ** 2)

        run = compiled(mode, lambda ids: gradients_of(loss_fn, ids, variables), IDS)
        for _ in range(3):
            gradients = run(IDS)
            assert isinstance(gradients[0], tf.IndexedSlices)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return [variable.numpy() for variable in variables]

    def whole(loss_fn, ids, variables):
        with tf.GradientTape() as tape:
            loss = loss_fn(ids)
        return tape.gradient(loss, variables)

    def cut(loss_fn, ids, variables):
        return vb.value_and_gradients(loss_fn, ids, variables, microbatch_size=2)[1]

    # Adam divides by the size of the gradient, which magnifies rounding of small ones.
    assert_all_close(trained(cut), trained(whole), 1e-10)


@pytest.mark.parametrize("mode", TIERED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_repeated_id_is_summed_wide_in_half_precision(dtype, mode):
    # 2048 lookups of row 0: in bfloat16 the reader's own sum would stall. Powers of 2 keep TF's
    # own division exact.
    table = tf.Variable(tf.ones([3, 1], dtype))
    ids = tf.constant([0, 1, 0] * 1024)

    def loss_fn(ids):
        return tf.reduce_mean(tf.cast(lookup(table, ids), tf.float32))

    def train(ids):
        return vb.value_and_gradients(loss_fn, ids, [table], microbatch_size=512)

    _, (gradient,) = compiled(mode, train, ids)(ids)
    assert isinstance(gradient, tf.IndexedSlices)
    assert gradient.values.dtype == dtype
    one_third = float(tf.cast(1 / 3, dtype))
    two_thirds = float(tf.cast(2 / 3, dtype))
    assert_close(tf.convert_to_tensor(gradient)[:, 0], [two_thirds, one_third, 0.0])
