"""What a loss gives beside the loss, put together for the whole batch."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_all_close, assert_close
from tests.tensorflow.modes import TIERED, WITHOUT_XLA, arrays, compiled, uncut
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

X = np.random.default_rng(0).normal(size=(10, 4))
KERNEL = tf.Variable(np.ones((4, 1)))
# In some cut the micro-batch has as many rows as there are classes.
CUTS = {"even": 5, "ragged": 4, "as many as classes": 2, "one row each": 1, "uncut": 10}


def loss_of(x):
    return tf.reduce_mean(tf.tanh(x @ KERNEL) ** 2)


def run(mode, aux_of, size=4, batch=X):
    """(loss, aux), gradients of a loss with this aux."""

    def loss_fn(x):
        return loss_of(x), aux_of(x)

    def train(x):
        return vb.value_and_gradients(loss_fn, x, [KERNEL], microbatch_size=size, has_aux=True)

    return compiled(mode, train, batch)(tf.constant(batch))


@pytest.mark.parametrize("mode", TIERED)
@pytest.mark.parametrize("cut", tiered(CUTS, ["as many as classes"], "further cuts"))
def test_every_kind_of_leaf(cut, mode):
    def aux_of(x):
        sign = x[:, 0] > 0
        return {
            "rows": x[:, 1],
            "wide rows": [x @ KERNEL, tf.cast(x, tf.float32)],
            "labels": sign,
            "count": tf.shape(x)[0],
            "histogram": tf.reduce_sum(tf.one_hot(tf.cast(sign, tf.int32), 2, dtype=tf.int64), 0),
            "mean": tf.reduce_mean(x),
            "by class": tf.reduce_mean(x, 0)[:2],
        }

    (loss, aux), gradients = run(mode, aux_of, CUTS[cut])
    expected_loss, expected = uncut(loss_of, X, [KERNEL])
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)
    due = aux_of(tf.constant(X))
    tf.nest.assert_same_structure(aux, due)
    for found, want in zip(tf.nest.flatten(aux), tf.nest.flatten(due), strict=True):
        assert found.dtype == want.dtype
        assert_close(found, want)


@pytest.mark.parametrize("mode", WITHOUT_XLA)
def test_a_leaf_with_two_entries_is_not_taken_for_two_rows(mode):
    # Micro-batches of two rows; the leaf has two classes.
    (_, aux), _ = run(mode, lambda x: tf.reduce_mean(x, 0)[:2], size=2)
    assert_close(aux, X.mean(0)[:2])


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize(
    ("aux", "due"),
    [
        (None, None),
        ({}, {}),
        ({"a": None, "b": 2.5}, {"a": None, "b": 2.5}),
        ((), ()),
        # Integers are summed over the three micro-batches.
        ((1, [2]), (3, [6])),
    ],
    ids=str,
)
def test_leaves_that_are_no_tensors(aux, due, mode):
    (_, found), _ = run(mode, lambda x: aux)
    tf.nest.assert_same_structure(found, due)
    for leaf, want in zip(tf.nest.flatten(found), tf.nest.flatten(due), strict=True):
        assert leaf is None if want is None else float(leaf) == want


@pytest.mark.parametrize("mode", WITHOUT_XLA)
@pytest.mark.parametrize("order", tiered([0, 1], [0], "the other order"))
@pytest.mark.parametrize("size", tiered([2, 3], [2], "further cuts"))
def test_rows_of_a_ragged_batch(size, order, mode):
    words = tf.ragged.constant([[1.0, 2], [3], [], [4, 5, 6], [7], [8, 9]], dtype=tf.float64)
    batch = (words, tf.constant(X[:6, 0]))[:: 1 - 2 * order]
    scale = tf.Variable(np.float64(2))

    def loss_fn(batch):
        words, y = batch[:: 1 - 2 * order]
        found = tf.reduce_sum(words, 1) * scale
        return tf.reduce_mean((found - y) ** 2), found

    def train(batch):
        return vb.value_and_gradients(loss_fn, batch, [scale], microbatch_size=size, has_aux=True)

    (_, aux), _ = compiled(mode, train, batch)(batch)
    assert_close(aux, [6.0, 6, 0, 30, 14, 34])


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_aux_of_a_window(mode):
    window = vb.Window([X[:3], X[3:7], X[7:]])

    def train(window):
        return vb.value_and_gradients(
            lambda x: (loss_of(x), {"rows": x[:, 0], "mean": tf.reduce_mean(x)}),
            window,
            [KERNEL],
            has_aux=True,
        )

    (_, aux), _ = compiled(mode, train, None)(window)
    assert_close(aux["rows"], X[:, 0])
    assert_close(aux["mean"], X.mean())


def test_means_go_by_rows_where_the_loss_goes_by_weight():
    (loss, aux), _ = vb.value_and_gradients(
        lambda x: (tf.reduce_mean(x) * tf.reduce_sum(KERNEL) / 4, tf.reduce_mean(x)),
        np.array([[1.0], [2.0], [6.0]]),
        [KERNEL],
        microbatch_size=2,
        weight=lambda x: tf.where(x[0, 0] > 5, 9.0, 1.0),
        has_aux=True,
    )
    assert_close(loss, 0.1 * 1.5 + 0.9 * 6)
    assert_close(aux, 3.0)


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_means_are_summed_wide(dtype, mode):
    (_, aux), _ = run(mode, lambda x: tf.ones([], dtype), size=1, batch=np.ones((600, 4)))
    assert aux.dtype == dtype
    assert float(aux) == 1.0


REFUSED = {
    "text": (lambda x: tf.constant("a"), r"Got string\. Cast it"),
    "boolean": (lambda x: tf.reduce_any(x > 0), r"Got bool\. Cast it"),
    "ragged": (
        lambda x: tf.RaggedTensor.from_row_lengths(x[:, 0], [tf.shape(x)[0]]),
        r"must be a dense tensor, a number or None\. Got RaggedTensor\. Return its dense parts",
    ),
    "sparse": (lambda x: tf.sparse.from_dense(x), r"Got SparseTensor\."),
}


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("kind", REFUSED)
def test_leaves_without_a_meaning_are_refused(kind, mode):
    aux_of, text = REFUSED[kind]
    with pytest.raises(TypeError, match=text):
        run(mode, aux_of)


def test_a_loss_that_only_one_number_of_rows_can_trace_is_told():
    with pytest.raises(
        TypeError,
        match=r"must be traceable with any number of rows.*Got AttributeError with 6 rows"
        r"(.|\n)*Use TensorFlow operations instead of \.numpy\(\)",
    ):
        run("eager", lambda x: x.numpy(), size=5)


@pytest.mark.parametrize(
    "given",
    [[{"a": 1}, {"b": 1}], [{"a": 1}, {"a": 1, "b": 2}], [1.0, None], [None, 1.0], [1, 1.0]],
    ids=str,
)
def test_structures_that_differ(given):
    results = iter(given)
    with pytest.raises(ValueError, match="aux must have the same structure for every micro-batch"):
        run("eager", lambda x: next(results), size=5)


def test_structures_that_differ_between_shapes_of_a_graph():
    with pytest.raises(ValueError, match="aux must have the same structure for every micro-batch"):
        run("static", lambda x: {len(x): 1})


class Method:
    def __init__(self):
        self.calls = 0

    def loss(self, x):
        self.calls += 1
        return loss_of(x), x[:, 0]


@dataclasses.dataclass
class Unhashable:
    scale: float = 1.0

    def __call__(self, x):
        return loss_of(x) * self.scale, x[:, 0]


class WithoutWeakReferences:
    __slots__ = ()

    def __call__(self, x):
        return loss_of(x), x[:, 0]


@pytest.mark.parametrize(
    "loss_fn",
    [Method().loss, Unhashable(), WithoutWeakReferences()],
    ids=["method", "unhashable", "no weak references"],
)
def test_any_callable_may_give_aux(loss_fn):
    (_, aux), _ = vb.value_and_gradients(loss_fn, X, [KERNEL], microbatch_size=5, has_aux=True)
    assert_close(aux, X[:, 0])


class TwoMethods:
    def of_rows(self, x):
        return loss_of(x), tf.abs(x)[:, 0]

    def of_columns(self, x):
        return loss_of(x), tf.reduce_mean(tf.abs(x), 0)


def test_methods_of_one_object_are_told_apart():
    both, square = TwoMethods(), X[:8, :4]
    for method, due in [
        (both.of_rows, np.abs(square)[:, 0]),
        (both.of_columns, np.abs(square).mean(0)),
    ]:
        (_, aux), _ = vb.value_and_gradients(
            method, square, [KERNEL], microbatch_size=4, has_aux=True
        )
        assert_close(aux, due)


def test_an_eager_loop_traces_its_loss_once():
    method = Method()
    for _ in range(3):
        vb.value_and_gradients(method.loss, X, [KERNEL], microbatch_size=5, has_aux=True)
    assert method.calls == 3 * 2 + 1


def test_a_loss_may_change_what_it_gives():
    form = {"aux": lambda x: (x[:, 0], tf.reduce_mean(x))}

    def loss_fn(x):
        return loss_of(x), form["aux"](x)

    def train():
        (_, aux), _ = vb.value_and_gradients(loss_fn, X, [KERNEL], microbatch_size=5, has_aux=True)
        return aux

    assert_close(train()[0], X[:, 0])
    form["aux"] = lambda x: x[:, 1]
    assert_close(train(), X[:, 1])
