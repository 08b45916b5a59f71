"""Cases that other accumulation loops get wrong, with the figures that are due.

Most use one-hot samples and a step of size 1, so that what a weight moved by is the part of the
update that its sample or token received. The names are those of the survey of peers.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import assert_close
from tests.tensorflow.modes import compiled

import virtualbatch.tensorflow as vb

MODES = ["eager", "static"]


class OneHot:
    """A linear model in which sample i moves weight i alone."""

    def __init__(self, samples, optimizer=None):
        self.weights = tf.Variable(np.zeros(samples))
        self.optimizer = optimizer or keras.optimizers.SGD(1.0)

    def mean(self, rows):
        """The mean over rows."""
        return tf.reduce_mean(tf.linalg.matvec(rows, self.weights))

    def update(self, batch, loss_fn=None, mode="eager", **options):
        """One update; what each weight moved by."""
        before = self.weights.numpy()
        loss_fn = loss_fn or self.mean

        def gradients(batch):
            return vb.value_and_gradients(loss_fn, batch, [self.weights], **options)[1]

        found = compiled(mode, gradients, batch)(batch)
        self.optimizer.apply_gradients(zip(found, [self.weights], strict=True))
        return before - self.weights.numpy()


@pytest.mark.parametrize("mode", MODES)
def test_f1_every_token_counts_once(mode):
    # Two micro-batches of 2 x 4 tokens, 7 valid and 1 valid. Peers give the lone token 4 times.
    model = OneHot(16)
    mask = np.ones((4, 4))
    mask[1, 3] = mask[2, :] = mask[3, 1:] = 0
    tokens = np.eye(16).reshape(4, 4, 16)

    def loss_fn(batch):
        values = tf.linalg.matvec(batch["tokens"], model.weights)
        return tf.reduce_sum(values * batch["mask"]) / tf.reduce_sum(batch["mask"])

    moved = model.update(
        {"tokens": tf.constant(tokens), "mask": tf.constant(mask)},
        loss_fn,
        mode,
        microbatch_size=2,
        weight=lambda batch: tf.reduce_sum(batch["mask"]),
    )
    assert_close(moved, mask.reshape(-1) * 0.125)


@pytest.mark.parametrize("mode", MODES)
def test_f2_a_short_last_batch_is_an_update_of_its_own(mode):
    # 10 samples by 4, two per window, two epochs: peers carry the short batch into the next epoch.
    model = OneHot(10)
    dataset = tf.data.Dataset.from_tensor_slices(np.eye(10)).batch(4)
    for _ in range(2):
        moved = [
            model.update(window, mode=mode) for window in vb.windows(dataset, accumulation_steps=2)
        ]
        assert_close(moved[0], [1 / 8] * 8 + [0] * 2)
        assert_close(moved[1], [0] * 8 + [1 / 2] * 2)
        assert len(moved) == 2
    assert int(model.optimizer.iterations) == 4


@pytest.mark.parametrize("mode", MODES)
def test_f3_a_trailing_window_is_neither_dropped_nor_too_small(mode):
    # 5 micro-batches, 4 per window. Peers never apply the fifth, or a quarter of it.
    model = OneHot(10)
    stream = tf.data.Dataset.from_tensor_slices(np.eye(10)).batch(2)
    moved = [model.update(window, mode=mode) for window in vb.windows(stream, accumulation_steps=4)]
    assert len(moved) == 2
    assert_close(moved[1], [0] * 8 + [1 / 2] * 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_f4_a_term_that_is_already_a_mean_counts_once(steps, mode):
    # Squared error over 7 + 1 tokens, plus the mean of v squared: due is 1 for any cut.
    model, extra = OneHot(8), tf.Variable(np.array([1.0, -1.0]))
    mask = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0]).reshape(4, 3)
    tokens = np.random.default_rng(0).normal(size=(4, 3, 8))

    def loss_fn(batch):
        errors = (tf.linalg.matvec(batch["tokens"], model.weights) - 1) ** 2
        return {
            "tokens": tf.reduce_sum(errors * batch["mask"]) / tf.reduce_sum(batch["mask"]),
            "extra": tf.reduce_mean(extra**2),
        }

    def gradients(batch):
        return vb.value_and_gradients(
            loss_fn,
            batch,
            [extra, model.weights],
            accumulation_steps=steps,
            weight=lambda batch: {"tokens": tf.reduce_sum(batch["mask"]), "extra": None},
        )[1]

    batch = {"tokens": tf.constant(tokens), "mask": tf.constant(mask, tf.float64)}
    of_extra, of_weights = compiled(mode, gradients, batch)(batch)
    assert_close(of_extra, [1.0, -1.0])
    due = -2 * (tokens * mask[:, :, None]).sum((0, 1)) / mask.sum()
    assert_close(of_weights, due)


@pytest.mark.parametrize("mode", MODES)
def test_f5_the_loss_is_not_times_the_micro_batches(mode):
    model = OneHot(8)
    moved = model.update(tf.eye(8, dtype=tf.float64), mode=mode, accumulation_steps=4)
    assert_close(moved, [1 / 8] * 8)


def test_f6_a_schedule_counts_updates():
    # Rate 1 for two updates, then 0. Peers read the schedule at 3, 7, 11 and never move.
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([2], [1.0, 0.0])
    model = OneHot(1, keras.optimizers.SGD(rate))
    moved = [float(model.update(np.ones((4, 1)), accumulation_steps=4)[0]) for _ in range(4)]
    assert moved == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("mode", MODES)
def test_f9_one_nan_spoils_its_own_window_only(mode):
    model = OneHot(1)

    def guarded(window):
        before = model.weights.numpy()
        moved = model.update(window, mode=mode)
        if not np.isfinite(moved).all():
            model.weights.assign(before)
        return float(before[0] - model.weights.numpy()[0])

    stream = [np.full((1, 1), value) for value in (1.0, np.nan, 1.0, 1.0, 1.0, 1.0)]
    assert [guarded(window) for window in vb.windows(stream, accumulation_steps=2)] == [0, 1, 1]


def test_f10_a_stateful_optimizer_is_fed_once_per_window():
    batch = np.random.default_rng(0).normal(size=(8, 3))
    cut, whole = (OneHot(3, keras.optimizers.Adam(0.1)) for _ in range(2))
    for _ in range(3):
        cut.update(batch, accumulation_steps=4)
        whole.update(batch, microbatch_size=8)
    assert int(cut.optimizer.iterations) == 3
    assert_close(cut.weights, whole.weights, 1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("ids", "due"),
    [
        ([[[0]], [[0], [1]]], [2 / 3, 1 / 3]),
        ([[[0, 0]], [[0, 1]]], [0.75, 0.25]),
        ([[[0, 0]], [[1, 1]]], [0.5, 0.5]),
    ],
    ids=["again", "repeated", "apart"],
)
def test_f10_rows_of_an_embedding_are_neither_doubled_nor_lost(ids, due, mode):
    table = tf.Variable(np.zeros((3, 1)))
    optimizer = keras.optimizers.SGD(1.0)
    window = vb.Window(tf.constant(microbatch) for microbatch in ids)

    def gradients(window):
        return vb.value_and_gradients(
            lambda ids: tf.reduce_mean(tf.nn.embedding_lookup(table, ids)), window, [table]
        )[1]

    optimizer.apply_gradients(zip(compiled(mode, gradients, window)(window), [table], strict=True))
    assert_close(table, -np.array([*due, 0.0])[:, None])


@pytest.mark.parametrize("mode", MODES)
def test_r4_fewer_micro_batches_than_steps_are_no_smaller_update(mode):
    model = OneHot(3)
    moved = model.update(np.eye(3), mode=mode, accumulation_steps=4)
    assert_close(moved, [1 / 3] * 3)


@pytest.mark.parametrize("mode", MODES)
def test_r4_each_micro_batch_has_its_own_dropout_mask(mode):
    dropout = keras.layers.Dropout(0.5, seed=1)

    def loss_fn(rows):
        kept = dropout(rows, training=True)
        return tf.reduce_mean(kept), kept

    def train(rows):
        return vb.value_and_gradients(loss_fn, rows, [], microbatch_size=1, has_aux=True)

    (_, masks), _ = compiled(mode, train, None)(tf.ones([4, 64]))
    assert len(np.unique(masks.numpy(), axis=0)) == 4


@pytest.mark.parametrize("mode", ["eager", "static", "jit"])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2, 1], [1, 2, 1]])
def test_r4_masks_differ_under_a_seed_too(mode, sizes):
    # Every trace of a graph draws the same numbers under a seed, wherever it is called.
    tf.random.set_seed(5)
    rows = tf.split(tf.ones([sum(sizes), 64]), sizes)
    variable = tf.Variable(1.0)

    def train(batch):
        def loss_fn(rows):
            mask = tf.cast(tf.random.uniform([1, 64]) < 0.5, tf.float32)
            return tf.reduce_mean(rows * mask * variable), rows * mask

        return vb.value_and_gradients(loss_fn, batch, [variable], has_aux=True)

    batch = vb.Window(rows)
    ((_, masks), _) = compiled(mode, train, batch)(batch)
    assert len(np.unique(masks.numpy(), axis=0)) == len(sizes)


def test_r9_a_field_with_fewer_rows_is_not_truncated():
    model = OneHot(2)
    for batch in ({"x": np.ones((4, 2)), "y": np.ones(8)}, {"x": np.ones((8, 2)), "y": np.ones(4)}):
        with pytest.raises(ValueError, match="the same number of rows"):
            model.update(batch, microbatch_size=2)


@pytest.mark.parametrize("mode", MODES)
def test_r10_unequal_totals_of_sample_weights(mode):
    model = OneHot(4)
    batch = {"x": tf.eye(4, dtype=tf.float64), "w": tf.constant([3.0, 3, 1, 1], tf.float64)}

    def loss_fn(batch):
        values = tf.linalg.matvec(batch["x"], model.weights)
        return tf.reduce_sum(values * batch["w"]) / tf.reduce_sum(batch["w"])

    moved = model.update(
        batch, loss_fn, mode, microbatch_size=2, weight=lambda batch: tf.reduce_sum(batch["w"])
    )
    assert_close(moved, [0.375, 0.375, 0.125, 0.125])


@pytest.mark.parametrize("mode", MODES)
def test_r10_two_outputs_with_two_masks(mode):
    first, second = OneHot(4), OneHot(4)
    masks = {"first": [1, 0, 1, 1], "second": [1, 1, 1, 0]}
    batch = {"x": tf.eye(4, dtype=tf.float64)} | {
        name: tf.constant(mask, tf.float64) for name, mask in masks.items()
    }
    models = {"first": first, "second": second}

    def loss_fn(batch):
        return {
            name: tf.reduce_sum(tf.linalg.matvec(batch["x"], model.weights) * batch[name])
            / tf.reduce_sum(batch[name])
            for name, model in models.items()
        }

    def gradients(batch):
        return vb.value_and_gradients(
            loss_fn,
            batch,
            [first.weights, second.weights],
            microbatch_size=2,
            weight=lambda batch: {name: tf.reduce_sum(batch[name]) for name in models},
        )[1]

    found = compiled(mode, gradients, batch)(batch)
    for gradient, mask in zip(found, masks.values(), strict=True):
        assert_close(gradient, np.array(mask) / 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_virtual_batch_that_the_micro_batch_does_not_divide(mode):
    # 650 samples in updates of 130 by micro-batches of 32: peers give the last two 13 times as
    # much, or drop the last ten.
    model = OneHot(650)
    for start in range(0, 650, 130):
        rows = np.eye(650)[start : start + 130]
        moved = model.update(rows, mode=mode, microbatch_size=32)
        assert_close(moved[start : start + 130], [1 / 130] * 130)
    assert_close(-model.weights.numpy(), [1 / 130] * 650)
    assert int(model.optimizer.iterations) == 5
