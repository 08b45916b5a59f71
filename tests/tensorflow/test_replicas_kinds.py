"""What a window of several replicas may hold: aux, embeddings, lists, windows, random numbers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.losses import loss as keras_losses
from tests.oracle import assert_all_close, assert_close
from tests.tensorflow.modes import uncut
from tests.tensorflow.replicated import (
    CUTS,
    collectives,
    given,
    local,
    open_rows,
    parts,
    run,
    together,
    two,
    variable,
    window_of,
)

import virtualbatch.tensorflow as vb
from virtualbatch.tensorflow import _keras_losses

RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(24, 3))
IDS = RANDOM.integers(0, 5, size=24)
BIG = 2**53 + 1


def values():
    """A dense variable, one whose gradient is sparse, and one that nothing depends on."""
    return {"kernel": np.ones((3, 1)), "table": np.ones((5, 2)), "unused": np.ones(2)}


def loss_and_aux(weights):
    def loss_fn(batch):
        x, ids = batch
        outputs = x @ weights["kernel"]
        loss = tf.reduce_mean(outputs**2) + tf.reduce_mean(tf.gather(weights["table"], ids) ** 3)
        aux = {
            "rows": outputs,
            "mean": tf.reduce_mean(x, 0),
            "complex": tf.complex(tf.reduce_mean(x), 1 - tf.reduce_mean(x)),
            "count": tf.shape(x)[0],
            "big": tf.reduce_sum(tf.cast(ids, tf.int64) * BIG),
            "none": None,
        }
        return loss, aux

    return loss_fn


@pytest.fixture(scope="module")
def windows():
    """What one graph gives for all cuts, and what one device does for the same micro-batches."""
    weights = {name: variable(value) for name, value in values().items()}
    options = {"microbatch_size": 4, "has_aux": True, "stats": True}
    step = run(window_of(loss_and_aux(weights), weights, **options), open_rows((X, IDS)))
    found = {cut: step(given(parts((X, IDS), counts))) for cut, counts in CUTS.items()}
    alone = {name: tf.Variable(value) for name, value in values().items()}
    due = vb.value_and_gradients(loss_and_aux(alone), (X, IDS), alone, **options)
    return found, due


@pytest.mark.parametrize("cut", CUTS)
def test_gradients_have_the_structure_and_kind_of_the_variables(windows, cut):
    found, (_, due, _) = windows
    _, gradients, _ = found[cut]
    assert gradients["unused"] is None
    slices = two().experimental_local_results(gradients["table"])
    assert all(isinstance(x, tf.IndexedSlices) for x in slices)
    # Sparse ones have an entry for each row of their own replica, and none without rows.
    assert [len(x.indices) for x in slices] == list(CUTS[cut])
    got = together({name: gradients[name] for name in ("kernel", "table")})
    assert_all_close(got, [tf.convert_to_tensor(due[name]) for name in ("kernel", "table")])


@pytest.mark.parametrize("cut", CUTS)
def test_aux_is_that_of_all_rows(windows, cut):
    found, ((loss, due), _, _) = windows
    (losses, aux), _, _ = found[cut]
    assert_close(local(losses), [loss] * 2)
    rows = local(aux["rows"])
    assert [len(x) for x in rows] == list(CUTS[cut])
    assert_close(np.concatenate(rows), due["rows"])
    assert_close(local(aux["mean"]), [due["mean"]] * 2)
    for part in (np.real, np.imag):
        assert_close(part(local(aux["complex"])), [part(due["complex"])] * 2)
    assert local(aux["count"]) == [24, 24]
    # More digits than a float has.
    assert local(aux["big"]) == [int(IDS.sum()) * BIG] * 2
    assert aux["none"] is None


@pytest.mark.parametrize("cut", CUTS)
def test_noise_statistics_are_those_of_all_replicas(windows, cut):
    found, (_, _, due) = windows
    _, _, stats = found[cut]
    assert local(stats.rows) == [24, 24]
    counts = {"12 and 12": 6, "5 and 19": 7, "0 and 24": 6}
    assert local(stats.microbatches) == [counts[cut]] * 2
    assert_close(local(stats.square), [due.square] * 2)
    if cut != "5 and 19":
        # Its micro-batches are others than those of one device.
        assert_close(local(stats.mean_square), [due.mean_square] * 2)


def test_half_precision_is_added_in_float32():
    with two().scope():
        w = tf.Variable(1, dtype=tf.bfloat16)
    ones = np.ones(2048, np.float32)
    step = run(
        window_of(lambda x: tf.reduce_mean(tf.cast(x, tf.bfloat16) * w), [w], microbatch_size=2)
    )
    losses, (gradients,) = step(given(parts(ones, (1024, 1024))))
    found = two().experimental_local_results(gradients)
    assert [x.dtype for x in found] == [tf.bfloat16] * 2
    assert [float(x) for x in found] == [0.5, 0.5]
    assert [float(x) for x in two().experimental_local_results(losses)] == [1, 1]


def squares(kernel):
    return lambda x: tf.reduce_mean((x @ kernel) ** 2)


def test_a_window_may_have_a_micro_batch_without_rows_on_some_replica():
    kernel, alone = variable(np.ones((3, 1))), tf.Variable(np.ones((3, 1)))
    cuts = [[X[:4], X[4:8]], [X[8:12], X[12:23]], [X[:0], X[23:24]]]
    window = vb.Window([given(cut) for cut in cuts])
    step = run(window_of(squares(kernel), [kernel]))
    losses, gradients = step(window)
    loss, due = uncut(squares(alone), X, [alone])
    assert_close(local(losses), [loss] * 2)
    assert_all_close(together(gradients), due)
    assert collectives(step.get_concrete_function(window).graph) == {"top": 4}


def test_a_micro_batch_whose_rows_are_not_known_may_be_empty():
    w = variable(2.0)

    def terms(batch):
        # Entries and groups of them are not as many, so that none of them are rows.
        mean = tf.reduce_sum(batch["entries"]) * w / tf.reduce_sum(batch["groups"])
        return {"mean": mean, "penalty": 0.1 * w**2}

    def weight(batch):
        return {"mean": tf.reduce_sum(batch["groups"]), "penalty": None}

    def pieces(*entries):
        return [{"entries": X[:n, 0], "groups": np.ones(n // 2)} for n in entries]

    window = vb.Window([given(pieces(4, 6)), given(pieces(0, 8))])
    losses, gradients = run(window_of(terms, w, weight=weight))(window)
    mean = (X[:4, 0].sum() + X[:6, 0].sum() + X[:8, 0].sum()) / 9
    assert_close(local(losses), [2 * mean + 0.4] * 2)
    assert_close(together(gradients)[0], mean + 0.4)


@pytest.mark.parametrize(
    "counts",
    [(0, 24), pytest.param((5, 19), marks=pytest.mark.thorough("a graph for each takes seconds"))],
)
def test_ragged_rows(counts):
    w = variable(2.0)
    ragged = tf.RaggedTensor.from_row_lengths(X.ravel(), [0, 3] + [3] * 21 + [6])

    def loss_fn(x):
        return tf.reduce_sum(x**2) * w / tf.cast(x.nrows(), tf.float64)

    step = run(window_of(loss_fn, w, microbatch_size=5))
    losses, gradients = step(given(parts(ragged, counts)))
    assert_close(local(losses), [2 * (X**2).sum() / 24] * 2)
    assert_close(together(gradients)[0], (X**2).sum() / 24)


def test_a_replica_without_rows_runs_nothing():
    with two().scope():
        kernel = tf.Variable(np.ones((3, 1)))
        calls = tf.Variable(
            0,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )

    def loss_fn(x):
        calls.assign_add(1)
        # Of no rows this has no shape.
        return tf.reduce_mean((tf.reshape(x, [-1, 3]) @ kernel) ** 2)

    # Both sizes agree for the rows that are there.
    step = run(window_of(loss_fn, [kernel], microbatch_size=8, accumulation_steps=3))
    losses, _ = step(given(parts(X, (0, 24))))
    assert_close(local(losses), [((X @ np.ones((3, 1))) ** 2).mean()] * 2)
    assert local(calls) == [0, 3]


def test_replicas_and_micro_batches_draw_other_numbers_under_a_seed():
    tf.random.set_seed(1)
    w = variable(1.0)

    def loss_fn(x):
        drawn = tf.random.uniform(tf.shape(x), dtype=tf.float64)
        return w * tf.reduce_mean(drawn), drawn

    step = run(window_of(loss_fn, w, microbatch_size=6, has_aux=True))
    (_, drawn), _ = step(given(parts(X, (12, 12))))
    numbers = np.concatenate(local(drawn)).reshape(4, -1)
    assert len({row.tobytes() for row in numbers}) == 4


def coupled(z):
    """A loss in which each row meets all others, and their order counts."""
    order = tf.cos(tf.range(24, dtype=tf.float64))
    return tf.reduce_logsumexp(z * tf.transpose(tf.roll(z, 1, 0))) + tf.reduce_sum(z[:, 0] * order)


@pytest.mark.parametrize(
    "counts",
    [(0, 24), pytest.param((7, 17), marks=pytest.mark.thorough("a graph for each takes seconds"))],
)
def test_embeddings_of_all_replicas(counts):
    kernel, alone = variable(np.ones((3, 1))), tf.Variable(np.ones((3, 1)))
    encode = vb.rowwise(lambda x: tf.tanh(x @ kernel), microbatch_size=5)

    def replica(x):
        context = tf.distribute.get_replica_context()
        with tf.GradientTape() as tape:
            # Each takes the loss of all rows, so that it is there as often as there are replicas.
            loss = coupled(context.all_gather(encode(x), 0)) / context.num_replicas_in_sync
        return loss, [tape.gradient(loss, kernel)]

    step = run(replica)
    losses, gradients = step(given(parts(X, counts)))
    loss, due = uncut(lambda x: coupled(tf.tanh(x @ alone)), X, [alone])
    assert_close(sum(local(losses)), loss)
    assert_all_close(together(gradients), due)
    assert collectives(step.get_concrete_function(given(parts(X, counts))).graph).keys() == {"top"}


@pytest.fixture
def of_keras():
    """A loss of Keras, its gradient's variable, and what one device finds of 24 rows."""
    kernel = variable(np.ones((3, 1)))
    loss_object = keras.losses.MeanSquaredError(dtype="float64")
    alone = tf.Variable(np.ones((3, 1)))
    with tf.GradientTape() as tape:
        due = tf.reduce_mean((X[:, :1] - X @ alone) ** 2)

    def loss_fn(batch):
        return loss_object(batch[:, :1], batch @ kernel)

    return loss_fn, kernel, (due.numpy(), tape.gradient(due, alone).numpy())


def assert_mean_over_rows(loss_fn, kernel, due):
    step = run(window_of(loss_fn, [kernel], microbatch_size=4), open_rows(X))
    loss, gradients = step(given(parts(X, CUTS["5 and 19"])))
    assert_all_close([local(loss)[0], *together(gradients)], due)


def test_a_loss_of_keras_is_a_mean_over_its_rows(of_keras):
    # Keras divides it by the number of replicas, whose parts are then means of means.
    divides = keras_losses.scale_loss_for_distribution
    assert_mean_over_rows(*of_keras)
    assert keras_losses.scale_loss_for_distribution is divides
    assert vars(keras_losses)[_keras_losses._DIVIDES] is divides
    assert keras_losses.__name__ == _keras_losses._MODULE


def test_a_function_keeps_no_loss_of_keras(of_keras):
    # Traced elsewhere it is divided, and stays so there.
    loss_fn, kernel, due = of_keras
    function = tf.function(loss_fn)
    elsewhere = run(function, open_rows(X))
    batch = given(parts(X, CUTS["12 and 12"]))
    before = local(elsewhere(batch))
    assert_mean_over_rows(function, kernel, due)
    assert_close(local(elsewhere(batch)), before)
    assert_close(sum(before), due[0])
    with pytest.raises(
        ValueError, match=r"not be in a tf\.function of its own.*Got one in loss_fn"
    ):
        assert_mean_over_rows(lambda x: tf.function(loss_fn)(x), kernel, due)
