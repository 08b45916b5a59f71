"""What a mean was divided by: every form of it, and micro-batches that have nothing to count."""

import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_all_close, assert_close
from tests.tensorflow.modes import MODES, TIERED, WITHOUT_XLA, arrays, compiled, uncut
from tests.tensorflow.problems import problem
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

# Counts that no two micro-batches share, so that a weight that is ignored is seen.
COUNTS = np.array([3, 0, 1, 7, 2, 0, 5, 4, 0, 11])
VALUES = np.random.default_rng(0).normal(size=10)
BATCH = (tf.constant(VALUES), tf.constant(COUNTS, tf.int32))
DUE = float((VALUES * COUNTS).sum() / COUNTS.sum())


def scale():
    return tf.Variable(np.float64(1))


def counted_mean(variable):
    """A mean in which a row counts as often as its count says."""

    def loss_fn(batch):
        values, counts = batch
        counts = tf.cast(counts, tf.float64)
        return tf.reduce_sum(values * counts) / tf.reduce_sum(counts) * variable

    return loss_fn


ON_ANY_DEVICE = {
    "int32": lambda b: tf.reduce_sum(b[1]),
    "int64": lambda b: tf.reduce_sum(tf.cast(b[1], tf.int64)),
    "uint8": lambda b: tf.cast(tf.reduce_sum(b[1]), tf.uint8),
    "float16": lambda b: tf.cast(tf.reduce_sum(b[1]), tf.float16),
    "float32": lambda b: tf.cast(tf.reduce_sum(b[1]), tf.float32),
    "float64": lambda b: tf.cast(tf.reduce_sum(b[1]), tf.float64),
    "in other units": lambda b: tf.cast(tf.reduce_sum(b[1]), tf.float64) * 0.1,
    "dict of one": lambda b: {"loss": tf.reduce_sum(b[1])},
}
ON_THE_HOST = {
    "NumPy": lambda b: np.sum(b[1]),
    "Python int": lambda b: int(np.sum(b[1])),
    # float32, as TensorFlow reads a Python float, would be off by 1e-8.
    "Python float": lambda b: float(np.sum(b[1])) * 0.1,
    "NumPy scalar": lambda b: np.float64(np.sum(b[1]) / 3),
}


@pytest.mark.parametrize(
    "mode", tiered(["eager", "static", "dynamic"], ["static"], "further ways to run it")
)
@pytest.mark.parametrize("kind", ON_ANY_DEVICE)
def test_weights_of_any_kind(kind, mode):
    variable = scale()

    def train(batch):
        return vb.value_and_gradients(
            counted_mean(variable),
            batch,
            [variable],
            microbatch_size=3,
            weight=ON_ANY_DEVICE[kind],
        )

    loss, (gradient,) = compiled(mode, train, BATCH)(BATCH)
    assert_close([loss, gradient], [DUE, DUE])


@pytest.mark.parametrize("kind", ON_THE_HOST)
def test_weights_of_the_host(kind):
    variable = scale()
    loss, (gradient,) = vb.value_and_gradients(
        counted_mean(variable), BATCH, [variable], microbatch_size=3, weight=ON_THE_HOST[kind]
    )
    assert_close([loss, gradient], [DUE, DUE])


def test_a_boolean_weight_counts_as_zero_or_one():
    variable = scale()
    for convert in (bool, np.bool_, tf.constant):
        loss, _ = vb.value_and_gradients(
            lambda batch: tf.reduce_mean(batch) * variable,
            np.array([1.0, 2.0, 5.0]),
            [variable],
            microbatch_size=1,
            weight=lambda batch, convert=convert: convert(bool(batch[0] > 1)),
        )
        assert_close(loss, 3.5)


def test_weights_are_read_once_each_and_before_the_first_forward():
    calls = []
    variable = scale()

    def loss_fn(batch):
        calls.append("loss")
        return tf.reduce_mean(batch) * variable

    def weight(batch):
        calls.append("weight")
        return len(batch)

    vb.value_and_gradients(loss_fn, np.ones(7), [variable], microbatch_size=3, weight=weight)
    assert calls == ["weight"] * 3 + ["loss"] * 3


# Micro-batches without items: loss and gradient are 0 / 0.

EMPTY = {
    "first empty": [0, 0, 1, 1, 0, 1],
    "last empty": [1, 1, 0, 1, 0, 0],
    "middle empty": [1, 0, 0, 0, 0, 1],
    "one left": [0, 0, 0, 1, 0, 0],
    "all empty": [0, 0, 0, 0, 0, 0],
}
ROWS = np.array([1.0, 2, 3, 4, 5, 6])


def masked_mean(variable):
    def loss_fn(batch):
        return tf.reduce_sum(batch["x"] * variable * batch["mask"]) / tf.reduce_sum(batch["mask"])

    return loss_fn


def mask_sum(batch):
    return tf.reduce_sum(batch["mask"])


def due(mask):
    return float((ROWS * mask).sum() / max(sum(mask), 1))


def test_an_empty_micro_batch_really_is_not_a_number():
    variable = scale()
    batch = {"x": tf.constant(ROWS), "mask": tf.zeros(6, tf.float64)}
    loss, (gradient,) = uncut(masked_mean(variable), batch, [variable])
    assert np.isnan([loss, gradient]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", tiered(EMPTY, ["middle empty"], "further masks"))
def test_an_empty_micro_batch_adds_nothing(name, mode):
    mask = EMPTY[name]
    variable = scale()
    batch = {"x": tf.constant(ROWS), "mask": tf.constant(mask, tf.float64)}

    def train(batch):
        return vb.value_and_gradients(
            masked_mean(variable), batch, [variable], microbatch_size=2, weight=mask_sum
        )

    loss, (gradient,) = compiled(mode, train, batch)(batch)
    assert_close([loss, gradient], [due(mask), due(mask)])


@pytest.mark.parametrize("mode", TIERED)
@pytest.mark.parametrize("second", ["one left", "all empty"])
def test_an_empty_term_leaves_the_others_alone(second, mode):
    variable, other = scale(), scale()
    masks = {"a": EMPTY["first empty"], "b": EMPTY[second]}
    batch = {"x": tf.constant(ROWS)} | {
        name: tf.constant(mask, tf.float64) for name, mask in masks.items()
    }

    def term(batch, name):
        return masked_mean(variable)({"x": batch["x"], "mask": batch[name]})

    def loss_fn(batch):
        return {"a": term(batch, "a"), "b": 10 * term(batch, "b"), "other": other**2}

    def weight(batch):
        return {
            "a": tf.reduce_sum(batch["a"]),
            "b": tf.reduce_sum(batch["b"]),
            "other": None,
        }

    def train(batch):
        return vb.value_and_gradients(
            loss_fn, batch, [variable, other], microbatch_size=2, weight=weight
        )

    loss, gradients = compiled(mode, train, batch)(batch)
    expected = due(masks["a"]) + 10 * due(masks["b"])
    assert_close(loss, expected + 1)
    assert_all_close(arrays(gradients), [expected, 2.0])


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_empty_micro_batch_adds_nothing_in_any_precision(dtype, mode):
    variable = tf.Variable(tf.ones([], dtype))
    batch = {"x": tf.constant([1, 2, 3, 4], dtype), "mask": tf.constant([0, 0, 1, 1], dtype)}

    def train(batch):
        return vb.value_and_gradients(
            masked_mean(variable), batch, [variable], microbatch_size=2, weight=mask_sum
        )

    loss, (gradient,) = compiled(mode, train, batch)(batch)
    assert_close([float(loss), float(gradient)], [3.5, 3.5])


@pytest.mark.parametrize("mode", WITHOUT_XLA)
def test_an_empty_micro_batch_of_an_embedding_adds_zero_rows(mode):
    table = tf.Variable(np.ones((3, 1)))
    batch = {"ids": tf.constant([0, 1, 2, 2]), "mask": tf.constant([0, 0, 1, 1], tf.float64)}

    def loss_fn(batch):
        found = tf.nn.embedding_lookup(table, batch["ids"])[:, 0]
        return tf.reduce_sum(found * batch["mask"]) / tf.reduce_sum(batch["mask"])

    def train(batch):
        return vb.value_and_gradients(loss_fn, batch, [table], microbatch_size=2, weight=mask_sum)

    loss, gradients = compiled(mode, train, batch)(batch)
    assert_close(loss, 1.0)
    assert_all_close(arrays(gradients), [[[0.0], [0.0], [1.0]]])


def test_a_nan_of_a_micro_batch_with_items_is_not_hidden():
    variable = scale()
    x = np.array([1.0, np.nan])
    for run in (lambda f: f, tf.function):
        loss, (gradient,) = run(
            lambda x: vb.value_and_gradients(
                lambda x: tf.reduce_mean(x) * variable,
                x,
                [variable],
                microbatch_size=1,
                weight=lambda x: 1.0,
            )
        )(x)
        assert np.isnan([loss, gradient]).all()


# Terms


@pytest.mark.parametrize("mode", WITHOUT_XLA)
def test_a_term_that_does_not_depend_on_the_rows_counts_once(mode):
    variable = scale()

    def train(x):
        return vb.value_and_gradients(
            lambda x: {"penalty": variable**2},
            x,
            [variable],
            microbatch_size=2,
            weight=lambda x: {"penalty": None},
        )

    x = tf.ones([7])
    loss, (gradient,) = compiled(mode, train, x)(x)
    assert_close([loss, gradient], [1.0, 2.0])


def test_terms_may_be_named_in_any_order_and_by_anything():
    loss_fn, weight, make_batch, variables, _ = problem("terms")
    names = {"tokens": 1, "weighted": ("b", 2)}

    def renamed(function):
        return lambda batch: {names[key]: value for key, value in function(batch).items()}

    batch = make_batch(11)
    expected = uncut(loss_fn, batch, variables)[1]
    for run in (lambda f: f, tf.function):
        _, gradients = run(
            lambda batch: vb.value_and_gradients(
                renamed(loss_fn), batch, variables, microbatch_size=4, weight=renamed(weight)
            )
        )(batch)
        assert_all_close(arrays(gradients), expected)


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_a_term_may_be_called_loss(mode):
    variable = scale()

    def train(x):
        return vb.value_and_gradients(
            lambda x: {"loss": variable**2, "more": tf.reduce_mean(x) * variable},
            x,
            [variable],
            microbatch_size=2,
            weight=lambda x: {"loss": None, "more": tf.size(x)},
        )

    x = tf.constant([1.0, 2, 6], tf.float64)
    assert_close(compiled(mode, train, x)(x)[1][0], 5.0)


def test_without_a_weight_function_every_term_weighs_by_rows():
    variable = scale()
    x = np.arange(5.0)
    loss, (gradient,) = vb.value_and_gradients(
        lambda x: {"a": tf.reduce_mean(x) * variable, "b": tf.reduce_mean(x**2) * variable},
        x,
        [variable],
        microbatch_size=3,
    )
    due = x.mean() + (x**2).mean()
    assert_close([loss, gradient], [due, due])
