"""Windows whose rows cannot be told: with a weight their micro-batches are taken as they are."""

import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_all_close, assert_close
from tests.tensorflow.modes import WITHOUT_XLA, arrays, compiled, uncut

import virtualbatch.tensorflow as vb

X = [np.random.default_rng(n).normal(size=(n, 2)) for n in (5, 3, 3)]
WHOLE = np.concatenate(X)


class Graph:
    """Of the user's own."""

    def __init__(self, x):
        self.x = x


def edges(x):
    return {"x": x, "edge": np.zeros((2, len(x) + 2))}


def other(x):
    return (x, np.ones(1)) if len(x) == 3 else {"x": x}


def rows(batch):
    if isinstance(batch, Graph):
        return batch.x
    return batch["x"] if isinstance(batch, dict) else batch[0]


def weight(batch):
    return tf.shape(rows(batch))[0]


@pytest.fixture
def kernel():
    return tf.Variable(np.random.default_rng(1).normal(size=(2, 1)))


def mean(kernel, x):
    return tf.reduce_mean(tf.tanh(x @ kernel))


@pytest.mark.parametrize("mode", WITHOUT_XLA)
@pytest.mark.parametrize("make", [edges, other])
def test_with_a_weight_it_is_the_whole_batch(make, mode, kernel):
    def train(window):
        return vb.value_and_gradients(
            lambda batch: mean(kernel, rows(batch)), window, [kernel], weight=weight
        )

    window = vb.Window(map(make, X))
    loss, gradients = compiled(mode, train, window)(window)
    expected_loss, expected = uncut(lambda x: mean(kernel, x), WHOLE, [kernel])
    assert_close(loss, expected_loss)
    assert_all_close(arrays(gradients), expected)


@pytest.mark.parametrize("make", [edges, other, Graph])
def test_without_a_weight_it_is_refused_and_the_weight_named(make, kernel):
    with pytest.raises(ValueError, match=r"Or pass weight=.* See docs/guides/rows\.md\."):
        vb.value_and_gradients(
            lambda batch: mean(kernel, rows(batch)), vb.Window(map(make, X)), [kernel]
        )


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_objects_aux_terms_and_statistics(mode, kernel):
    def loss_fn(batch):
        found = rows(batch) @ kernel
        aux = {"nodes": found, "mean": tf.reduce_mean(found), "count": tf.shape(found)[0]}
        return mean(kernel, rows(batch)), aux

    # Objects are closed over: no graph takes them as arguments.
    def train():
        window = vb.Window(map(Graph, X))
        options = {"weight": weight, "has_aux": True, "stats": True}
        return vb.value_and_gradients(loss_fn, window, [kernel], **options)

    (_, aux), _, stats = train() if mode == "eager" else tf.function(train)()
    assert_close(aux["nodes"], WHOLE @ kernel)
    assert_close(aux["mean"], tf.reduce_mean(WHOLE @ kernel))
    assert int(aux["count"]) == 11
    by_rows = vb.value_and_gradients(lambda x: mean(kernel, x), vb.Window(X), [kernel], stats=True)[
        2
    ]
    assert float(stats.rows) == by_rows.rows == 11
    assert_close(stats.mean_square, by_rows.mean_square)


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_a_term_that_does_not_depend_on_the_rows_counts_once(mode, kernel):
    def terms(x):
        return {"mean": mean(kernel, x), "penalty": tf.reduce_sum(kernel**2)}

    def train(stats=False):
        return vb.value_and_gradients(
            lambda batch: terms(rows(batch)),
            vb.Window(map(edges, X)),
            [kernel],
            weight=lambda batch: {"mean": weight(batch), "penalty": None},
            stats=stats,
        )

    run = train if mode == "eager" else tf.function(train)
    expected = uncut(lambda x: sum(terms(x).values()), WHOLE, [kernel])[1]
    assert_all_close(arrays(run()[1]), expected)
    with pytest.raises(ValueError, match=r"whose loss has several terms\. Leave stats out\."):
        run(stats=True)


def test_what_cannot_be_cut_says_so_when_memory_runs_out(kernel):
    def too_large(batch):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    with pytest.raises(tf.errors.ResourceExhaustedError) as caught:
        vb.value_and_gradients(too_large, vb.Window(map(edges, X)), [kernel], weight=weight)
    assert "cannot be cut smaller. Make smaller ones." in caught.value.__notes__[0]
