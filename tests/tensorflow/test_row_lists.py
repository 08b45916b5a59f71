"""Lists of a batch are cut with its rows where that can be, and else refused."""

import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_all_close, assert_close
from tests.tensorflow.modes import arrays, uncut

import virtualbatch.tensorflow as vb

X = tf.constant(np.random.default_rng(0).normal(size=(4, 5, 2)))
LENGTHS = [5, 4, 2, 1]


@pytest.fixture
def kernel():
    return tf.Variable(np.random.default_rng(1).normal(size=(2, 1)))


def means(kernel, batch):
    pairs = zip(tf.unstack(batch["x"]), batch["lengths"], strict=True)
    return tf.stack([tf.reduce_mean(row[: int(n)] @ kernel) for row, n in pairs])


def loss_of(kernel):
    def loss_fn(batch):
        assert batch["names"] == ["a", "b"]
        return tf.reduce_mean(means(kernel, batch) ** 2)

    return loss_fn


@pytest.mark.parametrize(
    "lengths",
    [LENGTHS, tuple(LENGTHS), list(map(str, LENGTHS)), list(np.array(LENGTHS))],
    ids=["list", "tuple", "texts", "of NumPy"],
)
def test_a_list_as_long_as_the_batch_follows_the_rows(kernel, lengths):
    batch = {"x": X, "lengths": lengths, "names": ["a", "b"]}
    _, gradients = vb.value_and_gradients(loss_of(kernel), batch, [kernel], microbatch_size=3)
    assert_all_close(arrays(gradients), uncut(loss_of(kernel), batch, [kernel])[1])


def test_aux_of_a_list_is_told_from_classes(kernel):
    def loss_fn(batch):
        found = means(kernel, batch)
        return tf.reduce_mean(found), found

    batch = {"x": X, "lengths": LENGTHS}
    (_, found), _ = vb.value_and_gradients(
        loss_fn, batch, [kernel], microbatch_size=2, has_aux=True
    )
    assert_close(found, means(kernel, batch))


def test_certify_chooses_rows_of_lists(kernel):
    batch = {"x": X, "lengths": LENGTHS, "names": ["a", "b"]}
    assert vb.certify(loss_of(kernel), batch, [kernel], microbatch_size=2).exact


@pytest.mark.parametrize("rows", [4, None])
def test_a_list_that_a_graph_would_cut_is_refused(kernel, rows):
    @tf.function(input_signature=[tf.TensorSpec([rows, 5, 2], tf.float64)])
    def update(x):
        return vb.value_and_gradients(
            lambda batch: tf.reduce_mean(batch["x"] @ kernel),
            {"x": x, "lengths": LENGTHS},
            [kernel],
            microbatch_size=2,
        )[0]

    with pytest.raises(
        (TypeError, tf.errors.InvalidArgumentError), match=r"a graph cannot cut lists"
    ):
        update(X)
    if rows is None:
        # Of another length it belongs to every row.
        update(X[:3])
