"""Batches that come already cut."""

from collections import namedtuple

import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_all_close, assert_close
from tests.tensorflow.modes import QUICK, WITHOUT_XLA, arrays, compiled, open_rows, uncut
from tests.tensorflow.problems import NAMES, problem
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

Row = namedtuple("Row", "x y")
X = np.random.default_rng(0).normal(size=(11, 3))
Y = np.random.default_rng(1).normal(size=(11, 1))


def kernel():
    return tf.Variable(np.ones((3, 1)))


def squared_error(variable):
    """A loss of (x, y), of {"x", "y"} or of a Row."""

    def loss_fn(batch):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        return tf.reduce_mean((tf.tanh(tf.cast(x, tf.float64) @ variable) - y) ** 2)

    return loss_fn


# Rows of each micro-batch.
WINDOWS = {
    "equal": [4, 4, 4],
    "short last": [4, 4, 3],
    "all different": [1, 5, 2, 3],
    "two runs": [3, 3, 2, 2, 1],
    "alternating": [3, 2, 3, 2],
    "one": [5],
    "one row each": [1, 1, 1],
}


MODES = [(name, mode) for name in WINDOWS for mode in ("eager", "static", "dynamic")]


@pytest.mark.parametrize(
    "way",
    tiered(
        [*MODES, ("two runs", "jit")],
        [("two runs", mode) for mode in QUICK],
        "further windows",
    ),
    ids=str,
)
def test_a_window_equals_its_rows_in_one_batch(way):
    name, mode = way
    sizes = WINDOWS[name]
    loss_fn, weight, make_batch, variables, _ = problem("tokens")
    batch = make_batch(sum(sizes))
    parts = {key: tf.split(value, sizes) for key, value in batch.items()}
    window = vb.Window({key: values[i] for key, values in parts.items()} for i in range(len(sizes)))

    def train(window):
        return vb.value_and_gradients(loss_fn, window, variables, weight=weight)

    loss, gradients = compiled(mode, train, window)(window)
    expected_loss, expected = uncut(loss_fn, batch, variables)
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)


@pytest.mark.parametrize("name", tiered(NAMES, NAMES[-1:], "further losses"))
def test_micro_batches_may_come_in_any_order(name):
    loss_fn, weight, make_batch, variables, _ = problem(name)
    batch = make_batch(10)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 9), slice(9, 10)]
    expected = uncut(loss_fn, batch, variables)[1]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        window = vb.Window({key: value[cuts[i]] for key, value in batch.items()} for i in order)
        found = vb.value_and_gradients(loss_fn, window, variables, weight=weight)
        assert_all_close(arrays(found[1]), expected)


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_micro_batches_of_different_structure_are_refused(mode):
    variable = kernel()
    window = vb.Window([{"x": X[:2], "y": Y[:2]}, (X[2:4], Y[2:4])])

    def train():
        return vb.value_and_gradients(squared_error(variable), window, [variable])

    with pytest.raises(ValueError, match="must have the same structure"):
        train() if mode == "eager" else tf.function(train)()


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_micro_batches_of_different_dtypes(mode):
    variable = kernel()
    window = vb.Window([(X[:2], Y[:2]), (X[2:4].astype("float32"), Y[2:4])])

    def train():
        return vb.value_and_gradients(squared_error(variable), window, [variable])

    _, gradients = train() if mode == "eager" else tf.function(train)()
    x = np.concatenate([X[:2], X[2:4].astype("float32")])
    assert_all_close(arrays(gradients), uncut(squared_error(variable), (x, Y[:4]), [variable])[1])


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_micro_batches_with_other_leaves(mode):
    # Equal shapes, but a leaf that belongs to all rows differs: they must not be stacked.
    variable = tf.Variable(np.float64(1))
    window = vb.Window([{"x": np.ones(2), "factor": 2.0}, {"x": np.ones(2), "factor": 4.0}])

    def train():
        return vb.value_and_gradients(
            lambda batch: tf.reduce_mean(batch["x"]) * batch["factor"] * variable,
            window,
            [variable],
        )

    _, (gradient,) = train() if mode == "eager" else tf.function(train)()
    assert_close(gradient, 3.0)


@pytest.mark.parametrize("mode", WITHOUT_XLA)
def test_ragged_micro_batches(mode):
    scale = tf.Variable(np.float64(2))
    rows = [[1.0, 2], [3], [], [4, 5, 6], [7]]
    whole = tf.ragged.constant(rows, dtype=tf.float64)
    window = vb.Window([whole[:2], whole[2:]])

    def loss_fn(x):
        return tf.reduce_mean(tf.reduce_sum(x, 1) * scale)

    def train(window):
        return vb.value_and_gradients(loss_fn, window, [scale])

    _, (gradient,) = compiled(mode, train, window)(window)
    assert_close(gradient, 28 / 5)


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_sparse_micro_batches(mode):
    variable = kernel()

    def loss_fn(batch):
        return tf.reduce_mean((tf.sparse.sparse_dense_matmul(batch[0], variable) - batch[1]) ** 2)

    def train(window):
        return vb.value_and_gradients(loss_fn, window, [variable])

    def part(rows):
        return tf.sparse.from_dense(X[rows]), tf.constant(Y[rows])

    window = vb.Window([part(slice(0, 4)), part(slice(4, 8)), part(slice(8, 11))])
    _, gradients = compiled(mode, train, window)(window)
    assert_all_close(arrays(gradients), uncut(loss_fn, part(slice(0, 11)), [variable])[1])


def test_windows_of_a_dataset_one_update_each():
    variable = kernel()
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(2)

    @tf.function
    def train(window):
        return vb.value_and_gradients(squared_error(variable), window, [variable])

    found = [train(window) for window in vb.windows(dataset, accumulation_steps=4)]
    # 2 + 2 + 2 + 2 rows, then 2 + 1: the short window is divided by its own three rows.
    assert len(found) == 2
    for (loss, gradients), rows in zip(found, [slice(0, 8), slice(8, 11)], strict=True):
        expected_loss, expected = uncut(squared_error(variable), (X[rows], Y[rows]), [variable])
        assert_close(loss, expected_loss)
        assert_all_close(arrays(gradients), expected)


def test_a_window_of_numpy_arrays_enters_a_function():
    variable = kernel()

    @tf.function
    def train(window):
        return vb.value_and_gradients(squared_error(variable), window, [variable])

    window = vb.Window([(X[:4], Y[:4]), (X[4:], Y[4:])])
    _, gradients = train(window)
    assert_all_close(arrays(gradients), uncut(squared_error(variable), (X, Y), [variable])[1])


def test_a_window_comes_out_of_a_function_as_a_window():
    window = vb.Window([tf.ones(2), tf.zeros(3)])
    found = tf.function(lambda window: window)(window)
    assert isinstance(found, vb.Window)
    assert [len(microbatch) for microbatch in found] == [2, 3]


def test_open_rows_are_compared_within_each_micro_batch():
    variable = kernel()
    seen = tf.Variable(0)

    def loss_fn(batch):
        seen.assign_add(1)
        return squared_error(variable)(batch)

    window = vb.Window([(X[:4], Y[:4]), (X[4:], Y[4:])])

    @tf.function(input_signature=[open_rows(window)])
    def train(window):
        return vb.value_and_gradients(loss_fn, window, [variable])

    _, gradients = train(window)
    assert_all_close(arrays(gradients), uncut(squared_error(variable), (X, Y), [variable])[1])
    assert int(seen) == 2
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have the same number of rows"):
        train(vb.Window([(X[:4], Y[:4]), (X[4:], Y[4:6])]))
    assert int(seen) == 2
